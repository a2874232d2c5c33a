"""The device of the README's "A real run": a Modbus TCP server (pymodbus) on 127.0.0.1 port 5020.

    tests/.venv/bin/python config/quickstart-device.py

Unit 1 is a meter:
    input register 0 (2 words, f32)       voltage, swings slowly around 230 V
    holding register 40011 (2 words, u32) reads: goes up by one with every request, so that a message that is
                                          missing or doubled is seen with the naked eye
    discrete input 10001                  overheated, changes every 10 seconds
"""

import asyncio
import math
import struct
import time

from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

READ_DISCRETE_INPUTS, READ_HOLDING, READ_INPUT = 2, 3, 4
READS = 10  # 40011 on the wire


async def measure(function, _start, _address, _count, registers, _written):
    """pymodbus calls this before it answers; `registers` is the table that is asked for."""
    now = time.monotonic()
    if function == READ_INPUT:
        voltage = round(230 + 2 * math.sin(now / 10), 1)
        registers[0:2] = struct.unpack(">HH", struct.pack(">f", voltage))
    elif function == READ_HOLDING:
        high, low = registers[READS], registers[READS + 1]
        registers[READS : READS + 2] = struct.unpack(">HH", struct.pack(">I", (high << 16 | low) + 1))
    elif function == READ_DISCRETE_INPUTS:
        registers[0] = int(now / 10) % 2


async def main():
    coils, discrete = [[SimData(0, values=[False] * 16, datatype=DataType.BITS)] for _ in range(2)]
    holding, inputs = [[SimData(0, values=[0] * 16, datatype=DataType.REGISTERS)] for _ in range(2)]
    meter = SimDevice(1, (coils, discrete, holding, inputs), action=measure)
    await ModbusTcpServer([meter], address=("127.0.0.1", 5020)).serve_forever()


asyncio.run(main())
