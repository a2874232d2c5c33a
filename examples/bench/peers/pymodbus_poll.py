"""The same reads, in order, for ever, with pymodbus's synchronous client.

    pymodbus_loop.py PORT UNIT:FUNCTION:ADDRESS:COUNT...
"""

import sys

from pymodbus.client import ModbusTcpClient

port, *blocks = sys.argv[1:]
client = ModbusTcpClient("127.0.0.1", port=int(port))
assert client.connect()
reads = {"3": client.read_holding_registers, "4": client.read_input_registers}
plan = [block.split(":") for block in blocks]
plan = [(reads[function], int(unit), int(address), int(count)) for unit, function, address, count in plan]
while True:
    for read, unit, address, count in plan:
        if len(read(address, count=count, device_id=unit).registers) != count:
            sys.exit("pymodbus: a short reply")
