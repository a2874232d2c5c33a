// A second broker of another make: aedes, on a free port of 127.0.0.1. Prints `ready PORT`, then a line for every
// PUBLISH it takes from a client, which is not one for a QoS 2 packet whose identifier it holds. Ends with its
// standard input, and so with the test that started it.

import { createServer } from 'node:net'
import { Aedes } from 'aedes'

const broker = await Aedes.createBroker()
broker.on('publish', (packet, client) => {
  if (client) console.log(`publish ${client.id} ${packet.qos} ${packet.topic} ${packet.payload.length}`)
})

const server = createServer(broker.handle)
server.listen(0, '127.0.0.1', () => console.log(`ready ${server.address().port}`))

process.stdin.resume()
process.stdin.on('end', () => process.exit())
