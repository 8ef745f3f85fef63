/* Answers every POST with 200 as PostHog does, and counts: requests, body bytes, and the events in them.
 *
 *   sink PORT [FOLDER|- [strict]]
 *
 * By the v1 protocol the answer has as many results as the agent's batches have events. When strict, each body is
 * opened first, and one that holds a number beyond a double (1e999) is answered 400, as PostHog does.
 *
 * One thread, epoll, keep-alive. GET /seen tells requests and bytes as JSON; GET / inflates what it has kept and
 * counts the events too, so that nothing can be lost unseen and counting takes no CPU from the agent meanwhile.
 * With a FOLDER each body is also written there, for the quiet-host row.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#define ROOM (24 * 1024 * 1024) /* the largest request */
#define MOST 256                /* connections */

static struct { char *data; size_t size, room; } clients[4096];
static long requests, events, body_bytes, bad;
static double first, last;
static const char *folder;
static int strict;
static char *results; /* what v1 answers: a result for each of 1,000 events */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* Each event has a uuid of its own on its root, and none of the bench's events has one in its properties. */
static long count_in(const char *text, size_t size) {
    long found = 0;
    for (const char *at = text, *end = text + size; (at = memmem(at, end - at, "\"uuid\":\"", 8)); at += 8) found++;
    return found;
}

static struct kept { struct kept *next; size_t size; int gzip; char body[]; } *kept;

/* The text of a body. */
static const char *opened(const char *body, size_t *size, int gzip) {
    static char *out;
    if (!gzip) return body;
    if (!out) out = malloc(4 * ROOM);
    z_stream z = {.next_in = (Bytef *)body, .avail_in = *size, .next_out = (Bytef *)out, .avail_out = 4 * ROOM};
    inflateInit2(&z, 31);
    if (inflate(&z, Z_FINISH) != Z_STREAM_END) bad++;
    *size = z.total_out;
    inflateEnd(&z);
    return out;
}

/* Open what was kept, and count its events. */
static void count_kept(void) {
    while (kept) {
        struct kept *one = kept;
        kept = one->next;
        size_t size = one->size;
        const char *text = opened(one->body, &size, one->gzip);
        events += count_in(text, size);
        free(one);
    }
}

static int is_poison(const char *body, size_t size, int gzip) {
    const char *text = opened(body, &size, gzip);
    return memmem(text, size, ":1e999", 6) != NULL;
}

static void take(const char *body, size_t size, int gzip) {
    requests++;
    body_bytes += size;
    if (folder) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%ld", folder, requests);
        FILE *file = fopen(path, "w");
        if (file) fwrite(body, 1, size, file), fclose(file);
    }
    struct kept *one = malloc(sizeof *one + size);
    one->next = kept, one->size = size, one->gzip = gzip;
    memcpy(one->body, body, size);
    kept = one;
    last = now();
    if (!first) first = last;
}

static void answer(int fd, const char *status, const char *text) {
    static char out[256 * 1024];
    int size = snprintf(out, sizeof out,
                        "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", status,
                        strlen(text), text);
    if (write(fd, out, size) != size) perror("write");
}

static void make_results(void) {
    char *at = results = malloc(1000 * 80 + 64);
    at += sprintf(at, "{\"results\":{");
    for (int n = 0; n < 1000; n++)
        at += sprintf(at, "%s\"00000000-0000-4000-8000-%012d\":{\"result\":\"ok\"}", n ? "," : "", n);
    sprintf(at, "}}");
}

/* Handle every whole request that a client has sent; 0 when it should be closed. */
static int serve(int fd) {
    for (;;) {
        char *data = clients[fd].data, *end = memmem(data, clients[fd].size, "\r\n\r\n", 4);
        if (!end) return clients[fd].size < ROOM;
        size_t head = end + 4 - data, length = 0;
        int gzip = 0;
        *end = 0;
        char *at = strcasestr(data, "content-length:");
        if (at) length = strtoul(at + 15, NULL, 10);
        if ((at = strcasestr(data, "content-encoding:"))) gzip = strstr(at, "gzip") != NULL;
        *end = '\r';
        if (head + length > clients[fd].size) return head + length < ROOM;
        if (strncmp(data, "POST", 4) == 0 && strict && is_poison(data + head, length, gzip)) {
            answer(fd, "400 Bad Request", "failed to parse request");
        } else if (strncmp(data, "POST", 4) == 0) {
            take(data + head, length, gzip);
            answer(fd, "200 OK", strncmp(data, "POST /i/v1/", 11) ? "{\"status\":\"Ok\"}" : results);
        } else {
            char text[512];
            if (strncmp(data, "GET /seen", 9)) count_kept();
            snprintf(text, sizeof text,
                     "{\"requests\":%ld,\"events\":%ld,\"body_bytes\":%ld,\"bad\":%ld,\"first\":%.6f,\"last\":%.6f}",
                     requests, events, body_bytes, bad, first, last);
            answer(fd, "200 OK", text);
        }
        clients[fd].size -= head + length;
        memmove(data, data + head + length, clients[fd].size);
    }
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    folder = argc > 2 && strcmp(argv[2], "-") ? argv[2] : NULL;
    strict = argc > 3;
    make_results();
    int one = 1, door = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (struct sockaddr *)&at, sizeof at) || listen(door, MOST)) {
        perror("bind");
        return 1;
    }
    struct epoll_event what = {.events = EPOLLIN, .data.fd = door}, seen[MOST];
    epoll_ctl(poll, EPOLL_CTL_ADD, door, &what);
    for (;;) {
        int count = epoll_wait(poll, seen, MOST, -1);
        for (int i = 0; i < count; i++) {
            int fd = seen[i].data.fd;
            if (fd == door) {
                int client = accept(door, NULL, NULL);
                if (client < 0 || client >= 4096) continue;
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                what.data.fd = client;
                clients[client].size = 0;
                epoll_ctl(poll, EPOLL_CTL_ADD, client, &what);
                continue;
            }
            if (clients[fd].room < clients[fd].size + 262144) {
                clients[fd].room = clients[fd].size * 2 + 524288;
                clients[fd].data = realloc(clients[fd].data, clients[fd].room);
            }
            ssize_t got = read(fd, clients[fd].data + clients[fd].size, 262144);
            if (got > 0) clients[fd].size += got;
            if (got <= 0 || !serve(fd)) close(fd);
        }
    }
}
