/* Answers every POST with 200 as PostHog does, and counts: requests, body bytes, and the events in them.
 *
 *   sink PORT [FOLDER]
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

/* Open what was kept, and count its events. */
static void count_kept(void) {
    static char *out;
    if (!out) out = malloc(4 * ROOM);
    while (kept) {
        struct kept *one = kept;
        kept = one->next;
        if (one->gzip) {
            z_stream z = {.next_in = (Bytef *)one->body, .avail_in = one->size};
            z.next_out = (Bytef *)out, z.avail_out = 4 * ROOM;
            inflateInit2(&z, 31);
            if (inflate(&z, Z_FINISH) != Z_STREAM_END) bad++;
            events += count_in(out, z.total_out);
            inflateEnd(&z);
        } else
            events += count_in(one->body, one->size);
        free(one);
    }
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

static void answer(int fd, const char *text) {
    char out[1024];
    int size = snprintf(out, sizeof out,
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                        strlen(text), text);
    if (write(fd, out, size) != size) perror("write");
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
        if (strncmp(data, "POST", 4) == 0) {
            take(data + head, length, gzip);
            answer(fd, "{\"status\":\"Ok\"}");
        } else {
            char text[512];
            if (strncmp(data, "GET /seen", 9)) count_kept();
            snprintf(text, sizeof text,
                     "{\"requests\":%ld,\"events\":%ld,\"body_bytes\":%ld,\"bad\":%ld,\"first\":%.6f,\"last\":%.6f}",
                     requests, events, body_bytes, bad, first, last);
            answer(fd, text);
        }
        clients[fd].size -= head + length;
        memmove(data, data + head + length, clients[fd].size);
    }
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    folder = argc > 2 ? argv[2] : NULL;
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
