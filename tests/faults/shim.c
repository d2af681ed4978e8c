/*
 * The worker process that torchrun starts in the fault tests: asks the zygote to fork the script's process (see zygote.py for
 * the protocol), then lives and dies with it: the same exit code, or the same signal. SIGTERM is passed on; when this
 * process is killed, the zygote sees the connection end and kills the script's process.
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

extern char **environ;
static int link_fd = -1;
static char request[1 << 20];
static uint32_t used = 4;

static void die(const char *what) {
    perror(what);
    _exit(125);
}

static void add(const char *text) {
    size_t length = strlen(text) + 1;
    if (used + length > sizeof request) die("shim: request too long");
    memcpy(request + used, text, length);
    used += length;
}

static void pass_on(int number) {
    (void)number;
    ssize_t ignored = write(link_fd, "T", 1);
    (void)ignored;
}

int main(int argc, char **argv) {
    char text[4096];
    const char *path = getenv("FAULTS_ZYGOTE");
    if (!path) die("shim: FAULTS_ZYGOTE");
    if (!getcwd(text, sizeof text)) die("shim: getcwd");
    add(text);
    snprintf(text, sizeof text, "%d", argc - 1);
    add(text);
    for (int i = 1; i < argc; i++) add(argv[i]);
    for (char **entry = environ; *entry; entry++) add(*entry);
    uint32_t length = used - 4; /* little-endian machines only, as torch's wheels */
    memcpy(request, &length, 4);

    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    link_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link_fd < 0 || connect(link_fd, (struct sockaddr *)&address, sizeof address)) die("shim: connect");

    int stdio[3] = {0, 1, 2};
    char control[CMSG_SPACE(sizeof stdio)];
    memset(control, 0, sizeof control);
    struct iovec vector = {.iov_base = request, .iov_len = used};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof stdio);
    memcpy(CMSG_DATA(header), stdio, sizeof stdio);
    ssize_t sent = sendmsg(link_fd, &message, MSG_NOSIGNAL);
    if (sent < 0) die("shim: sendmsg");
    for (size_t at = (size_t)sent; at < used; at += (size_t)sent)
        if ((sent = send(link_fd, request + at, used - at, MSG_NOSIGNAL)) < 0) die("shim: send");

    struct sigaction action = {.sa_handler = pass_on, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);

    FILE *answers = fdopen(link_fd, "r");
    while (fgets(text, sizeof text, answers)) {
        int number = atoi(text + 1);
        if (text[0] == 'E') _exit(number);
        if (text[0] == 'S') {
            signal(number, SIG_DFL);
            raise(number);
            _exit(128 + number);
        }
    }
    raise(SIGKILL); /* the zygote is gone */
    return 125;
}
