/* What a careful program around libmodbus does: the same reads, in order, for ever, one request at a time.
 *
 *     libmodbus rtu DEVICE BAUD UNIT:FUNCTION:ADDRESS:COUNT...
 *     libmodbus tcp PORT        UNIT:FUNCTION:ADDRESS:COUNT...
 *
 * libmodbus keeps no silence between frames by itself; on a serial line the loop keeps that of the standard
 * (Modbus over serial line V1.02, 2.5.1.1), as it must with devices that go by it.
 */
#include <modbus/modbus.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

struct block {
    int unit, function, address, count;
};

static void advance(struct timespec *at, long ns) {
    at->tv_nsec += ns;
    if (at->tv_nsec >= 1000000000L) {
        at->tv_nsec -= 1000000000L;
        at->tv_sec++;
    }
}

int main(int argc, char **argv) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int serial = argc > 1 && strcmp(argv[1], "rtu") == 0;
    int first = serial ? 4 : 3;
    if (argc <= first) {
        fprintf(stderr, "usage: libmodbus rtu DEVICE BAUD BLOCK... | tcp PORT BLOCK...\n");
        return 2;
    }
    long baud = serial ? atol(argv[3]) : 0;
    long silence_ns = !serial ? 0 : baud > 19200 ? 1750000 : 38500000000L / baud;
    int blocks = argc - first;
    struct block *plan = calloc(blocks, sizeof *plan);
    for (int i = 0; i < blocks; i++) {
        struct block *b = &plan[i];
        if (sscanf(argv[first + i], "%d:%d:%d:%d", &b->unit, &b->function, &b->address, &b->count) != 4)
            return 2;
    }
    modbus_t *bus = serial ? modbus_new_rtu(argv[2], baud, 'E', 8, 1) : modbus_new_tcp("127.0.0.1", atoi(argv[2]));
    modbus_set_response_timeout(bus, 1, 0);
    if (modbus_connect(bus) != 0) {
        perror("libmodbus: connect");
        return 1;
    }
    uint16_t registers[MODBUS_MAX_READ_REGISTERS];
    struct timespec free_at;
    clock_gettime(CLOCK_MONOTONIC, &free_at);
    for (int i = 0;; i = (i + 1) % blocks) {
        struct block *b = &plan[i];
        if (serial)
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &free_at, NULL);
        modbus_set_slave(bus, b->unit);
        int got = b->function == 3 ? modbus_read_registers(bus, b->address, b->count, registers)
                                   : modbus_read_input_registers(bus, b->address, b->count, registers);
        if (got != b->count) {
            perror("libmodbus: read");
            return 1;
        }
        if (serial) {
            clock_gettime(CLOCK_MONOTONIC, &free_at);
            advance(&free_at, silence_ns);
        }
    }
}
