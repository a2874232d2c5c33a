/* Whether this system, or what emulates it, does what serial ports are opened with: TCGETS2 on a pseudo terminal. */
#define _GNU_SOURCE
#include <asm/termbits.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

int main(void) {
    struct termios2 settings;
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) || unlockpt(master)) {
        printf("no pseudo terminal: %s\n", strerror(errno));
        return 1;
    }
    int port = open(ptsname(master), O_RDWR | O_NOCTTY);
    if (port < 0 || ioctl(port, TCGETS2, &settings)) {
        printf("TCGETS2: %s\n", strerror(errno));
        return 1;
    }
    return 0;
}
