/* Sends events to a local socket as fast as it takes them, or at a rate; never the bottleneck.
 *
 *   loader KIND ADDRESS COUNT [EVENTS_PER_SECOND [POISON [FORM]]]
 *
 * KIND is unix_stream, unix_stream_ack, tcp, tcp_ack, unix_datagram, udp or http. ADDRESS is a path or a port of
 * 127.0.0.1. FORM is json, logfmt, rfc5424 or rfc3164; http sends gzipped batches of 100 as PostHog's SDKs do, 32
 * requests at a time. The events are made before the first is sent, so that making them takes no CPU from the agent.
 * Of every POISON events one is such that PostHog refuses its batch. Prints when the first was sent (seconds since
 * 1970) and how long it took.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#define MANY 64             /* datagrams in one system call */
#define LARGEST 1024        /* bytes of one event, with room to spare */
#define WRITE (256 * 1024)  /* bytes of one write to a stream */
#define BATCH 100           /* events in one request of an SDK */
#define CONNECTIONS 32      /* of http */

static const char *NAMES[] = {"$pageview", "signup", "checkout started", "item added", "search"};
static const char *PLANS[] = {"free", "pro", "scale", "enterprise"};
static const char *AGENTS[] = {"Mozilla/5.0 (X11; Linux x86_64)", "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7)",
                               "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X)"};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* About 340 bytes, no two alike. */
static int json(char *to, long n, long poison, const char *more) {
    char number[24];
    sprintf(number, poison && n % poison == poison - 1 ? "1e999" : "%ld", n);
    unsigned r = (unsigned)n * 2654435761u;
    return sprintf(to,
                   "{\"event\":\"%s\",\"distinct_id\":\"user-%u\",\"properties\":{\"n\":%s,\"plan\":\"%s\","
                   "\"$current_url\":\"https://shop.example.com/products/%u?ref=%x\",\"amount\":%u.%02u,"
                   "\"$session_id\":\"%08x-%04x-7%03x-8%03x-%08x%04x\",\"user_agent\":\"%s\",\"screen_width\":%u,"
                   "\"logged_in\":%s,\"country\":\"DE\"}%s}\n",
                   NAMES[r % 5], r % 100000, number, PLANS[(r >> 8) % 4], (r >> 4) % 5000, r >> 12, r % 500, r % 100, r,
                   (r >> 3) & 0xffff, (r >> 5) & 0xfff, (r >> 7) & 0xfff, r * 31u, (r >> 9) & 0xffff, AGENTS[r % 3],
                   800 + r % 1200, r & 1 ? "true" : "false", more);
}

/* As an SDK has it: with its own name, a uuid and the time. */
static int captured(char *to, long n) {
    char more[200];
    unsigned r = (unsigned)n * 2246822519u;
    sprintf(more, ",\"uuid\":\"%08x-%04x-4%03x-9%03x-%012lx\",\"timestamp\":\"2026-11-24T%02u:%02u:%02u.%06u+00:00\"", r,
            (r >> 3) & 0xffff, (r >> 5) & 0xfff, (r >> 7) & 0xfff, n, r % 24, r % 60, (r >> 8) % 60, r % 1000000);
    return json(to, n, 0, more);
}

static int logfmt(char *to, long n) {
    unsigned r = (unsigned)n * 2654435761u;
    return sprintf(to,
                   "event=\"%s\" distinct_id=user-%u n=%ld plan=%s url=https://shop.example.com/products/%u/%x "
                   "amount=%u.%02u session=%08x%04x user_agent=\"%s\" screen_width=%u logged_in=%s country=DE\n",
                   NAMES[r % 5], r % 100000, n, PLANS[(r >> 8) % 4], (r >> 4) % 5000, r >> 12, r % 500, r % 100, r,
                   (r >> 3) & 0xffff, AGENTS[r % 3], 800 + r % 1200, r & 1 ? "true" : "false");
}

#define LINES_A_SECOND 5000 /* by the times that lines of syslog tell: those of one busy host */

static int rfc5424(char *to, long n) {
    unsigned r = (unsigned)n * 2654435761u;
    return sprintf(to,
                   "<%u>1 2026-11-24T13:%02u:%02u.%06uZ web-%u.example.com nginx %u ID%u [req@32473 method=\"GET\" "
                   "path=\"/products/%u\" status=\"%u\"] request %ld from %s took %u ms\n",
                   r % 192, (unsigned)(n / LINES_A_SECOND / 60 % 60), (unsigned)(n / LINES_A_SECOND % 60), r % 1000000,
                   r % 20, r % 30000, r % 50, (r >> 4) % 5000,
                   200 + r % 300, n, AGENTS[r % 3], r % 2000);
}

static int rfc3164(char *to, long n) {
    unsigned r = (unsigned)n * 2654435761u;
    return sprintf(to,
                   "<%u>Nov 24 13:%02u:%02u web-%u sshd[%u]: Accepted publickey for deploy from 192.0.2.%u port %u "
                   "ssh2: RSA SHA256:%08x%08x session %ld\n",
                   r % 192, (unsigned)(n / LINES_A_SECOND / 60 % 60), (unsigned)(n / LINES_A_SECOND % 60), r % 20,
                   r % 30000, r % 256, 1024 + r % 60000, r, r * 31u, n);
}

static int event(char *to, long n, long poison, const char *form) {
    if (strcmp(form, "logfmt") == 0) return logfmt(to, n);
    if (strcmp(form, "rfc5424") == 0) return rfc5424(to, n);
    if (strcmp(form, "rfc3164") == 0) return rfc3164(to, n);
    return json(to, n, poison, "");
}

static char *texts;   /* all events, one behind the other */
static size_t *ends; /* where each ends */

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void make(long count, long poison, const char *form) {
    size_t size = 0;
    texts = malloc((size_t)count * LARGEST);
    ends = malloc(count * sizeof *ends);
    for (long n = 0; n < count; n++) ends[n] = size += event(texts + size, n, poison, form);
}

/* Requests instead of events: `ends` has one entry for each. */
static void make_requests(long count) {
    static char body[BATCH * LARGEST + 100], packed[BATCH * LARGEST + 100];
    size_t size = 0;
    texts = malloc((size_t)count * LARGEST);
    ends = malloc((count / BATCH) * sizeof *ends);
    for (long n = 0; n < count / BATCH; n++) {
        int at = sprintf(body, "{\"api_key\":\"phc_bench\",\"batch\":[");
        for (long k = 0; k < BATCH; k++) {
            at += captured(body + at, n * BATCH + k);
            body[at - 1] = k < BATCH - 1 ? ',' : ']';
        }
        body[at++] = '}';
        z_stream z = {.next_in = (unsigned char *)body, .avail_in = at};
        z.next_out = (unsigned char *)packed;
        z.avail_out = sizeof packed;
        if (deflateInit2(&z, 6, Z_DEFLATED, 31, 8, Z_DEFAULT_STRATEGY) || deflate(&z, Z_FINISH) != Z_STREAM_END)
            fail("deflate");
        size += sprintf(texts + size,
                        "POST /batch/ HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: posthog-python/7.0.0\r\n"
                        "Content-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %lu\r\n\r\n",
                        z.total_out);
        memcpy(texts + size, packed, z.total_out);
        ends[n] = size += z.total_out;
        deflateEnd(&z);
    }
}

static int connected(const char *kind, const char *address) {
    int datagram = strcmp(kind, "udp") == 0 || strcmp(kind, "unix_datagram") == 0;
    int inet = strncmp(kind, "unix", 4) != 0;
    int fd = socket(inet ? AF_INET : AF_UNIX, datagram ? SOCK_DGRAM : SOCK_STREAM, 0);
    if (inet) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(address))};
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail(address);
    } else {
        struct sockaddr_un to = {.sun_family = AF_UNIX};
        strncpy(to.sun_path, address, sizeof to.sun_path - 1);
        if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail(address);
    }
    return fd;
}

static void write_all(int fd, const char *from, size_t size) {
    while (size) {
        ssize_t sent = send(fd, from, size, MSG_NOSIGNAL);
        if (sent < 0) fail("send");
        from += sent;
        size -= sent;
    }
}

/* Sleep until so many events are due. */
static void keep_pace(double began, long sent, double rate) {
    double wait = began + sent / rate - now();
    if (wait > 0) {
        struct timespec t = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
        nanosleep(&t, NULL);
    }
}

static void stream(int fd, long count, double rate, int ask) {
    static char in[65536];
    long accepted = 0;
    double began = now();
    if (ask) write_all(fd, "{\"ack\":true}\n", 13);
    for (long n = 0; n < count;) {
        size_t first = n ? ends[n - 1] : 0;
        long due = rate ? n + (long)(rate / 200) + 1 : count;
        while (n < count && n < due && ends[n] - first < WRITE) n++;
        write_all(fd, texts + first, ends[n - 1] - first);
        if (rate) keep_pace(began, n, rate);
    }
    shutdown(fd, SHUT_WR);
    while (ask && accepted < count) {
        ssize_t got = recv(fd, in, sizeof in - 1, 0);
        if (got <= 0) break;
        in[got] = 0;
        for (char *at = in; (at = strstr(at, "\"accepted\":")); at++) accepted = atol(at + 11);
    }
    if (ask) fprintf(stderr, "acknowledged %ld\n", accepted);
}

static void datagrams(int fd, long count, double rate) {
    struct mmsghdr messages[MANY];
    struct iovec parts[MANY];
    double began = now();
    for (long n = 0; n < count;) {
        long some = rate ? (long)(rate / 1000) + 1 : MANY;
        if (some > MANY) some = MANY;
        if (some > count - n) some = count - n;
        memset(messages, 0, sizeof messages);
        for (long i = 0; i < some; i++) {
            size_t first = n + i ? ends[n + i - 1] : 0;
            parts[i] = (struct iovec){texts + first, ends[n + i] - first};
            messages[i].msg_hdr.msg_iov = &parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        for (long done = 0; done < some;) {
            int sent = sendmmsg(fd, messages + done, some - done, 0);
            if (sent < 0) fail("sendmmsg");
            done += sent;
        }
        n += some;
        if (rate) keep_pace(began, n, rate);
    }
}

/* One request on each connection, then their answers, and so on. */
static void requests(int first, const char *address, long count) {
    static char in[65536];
    int fds[CONNECTIONS] = {first};
    for (int i = 1; i < CONNECTIONS; i++) fds[i] = connected("http", address);
    long many = count / BATCH;
    for (long n = 0; n < many + CONNECTIONS; n++) {
        int fd = fds[n % CONNECTIONS];
        if (n >= CONNECTIONS) {
            ssize_t got = recv(fd, in, sizeof in - 1, 0);
            if (got <= 0) fail("recv");
            in[got] = 0;
            if (strncmp(in, "HTTP/1.1 200", 12)) fail(in);
            while (!strstr(in, "}") && recv(fd, in, sizeof in - 1, 0) > 0);
        }
        if (n < many) write_all(fd, texts + (n ? ends[n - 1] : 0), ends[n] - (n ? ends[n - 1] : 0));
    }
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: loader KIND ADDRESS COUNT [EVENTS_PER_SECOND [POISON [FORM]]]\n");
        return 2;
    }
    int fd = connected(argv[1], argv[2]);
    long count = atol(argv[3]);
    double rate = argc > 4 ? atof(argv[4]) : 0;
    int http = strcmp(argv[1], "http") == 0;
    if (http)
        make_requests(count);
    else
        make(count, argc > 5 ? atol(argv[5]) : 0, argc > 6 ? argv[6] : "json");
    struct timespec start;
    clock_gettime(CLOCK_REALTIME, &start);
    double began = now();
    if (http)
        requests(fd, argv[2], count);
    else if (strncmp(argv[1], "unix_stream", 11) == 0 || strncmp(argv[1], "tcp", 3) == 0)
        stream(fd, count, rate, strstr(argv[1], "_ack") != NULL);
    else
        datagrams(fd, count, rate);
    printf("%.6f %.3f\n", start.tv_sec + start.tv_nsec / 1e9, now() - began);
    return 0;
}
