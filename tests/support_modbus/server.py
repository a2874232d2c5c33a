"""A Modbus server from another library (pymodbus), with known content.

    server.py tcp PORT      (0: any free port)
    server.py rtu DEVICE    (19200 8N1)

Prints "ready" and the port, and serves until it is killed. Unit 1 holds values of every type in every word
order, packed here by struct and not by fieldpost's own code; unit 3 lacks holding register 2; unit 9 never
answers.
"""

import asyncio
import struct
import sys

from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

# Where the bytes A (0) to D (3) stand on the wire.
ORDERS = [(0, 1, 2, 3), (2, 3, 0, 1), (1, 0, 3, 2), (3, 2, 1, 0)]


def registers(u16, i16, u32, i32, f32):
    """0: u16, 1: i16; from 10 on, for each order: u32, i32, f32."""
    words = list(struct.unpack(">HH", struct.pack(">Hh", u16, i16))) + [0] * 8
    for order in ORDERS:
        for value in (struct.pack(">I", u32), struct.pack(">i", i32), struct.pack(">f", f32)):
            words += struct.unpack(">HH", bytes(value[place] for place in order))
    return words


def block(address, values, datatype=DataType.REGISTERS):
    return SimData(address, values=values, datatype=datatype)


async def never(*_):
    await asyncio.Event().wait()


def devices():
    coils = [block(0, [n % 3 == 0 for n in range(32)], DataType.BITS)]
    discretes = [block(0, [n % 2 == 0 for n in range(32)], DataType.BITS)]
    holding = [block(0, registers(4242, -1, 4_000_000_001, -2, -0.05))]
    inputs = [block(0, registers(65535, -12345, 0xDEADBEEF, -123456789, 230.1))]
    return [
        SimDevice(1, (coils, discretes, holding, inputs)),
        SimDevice(3, [block(0, [100, 101]), block(3, [103])]),
        SimDevice(9, [block(0, [9, 9, 9, 9])], action=never),
    ]


async def main():
    kind, where = sys.argv[1:]
    if kind == "tcp":
        server = ModbusTcpServer(devices(), address=("127.0.0.1", int(where)))
    else:
        server = ModbusSerialServer(devices(), port=where, baudrate=19200, parity="N")
    await server.serve_forever(background=True)
    port = server.transport.sockets[0].getsockname()[1] if kind == "tcp" else 0
    print(f"ready {port}", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
