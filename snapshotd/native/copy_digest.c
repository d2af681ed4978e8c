/*
 * Copies chunks and digests them on the way: each byte is loaded once, and stored past the caches.
 *
 * A copy of more than the caches hold waits for memory, and so does a digest: one behind the other takes as long as both.
 * XXH3 does its arithmetic while the copy waits. LANES chunks go side by side, so that LANES pages are fetched at a time.
 *
 * Rule 1: a chunk has CHUNK_BYTES; its digest is XXH3_64bits with seed 0 and the default secret (xxHash's specification,
 * "XXH3 Algorithm", on inputs of more than 240 bytes): as in snapshotd/layout/digest.py.
 * Rule 2: targets begin at multiples of STRIPE_BYTES; sources lie anywhere. The two do not overlap.
 * Rule 3: nothing is allocated, and nothing is global but constants: any number of threads may call.
 * Rule 4: what was stored is there for others when a call returns (sfence).
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

#define CHUNK_BYTES 131072
#define STRIPE_BYTES 64

/* Bytes of the source, from `address` on. */
struct segment {
    uint64_t address, nbytes;
};

/*
 * `chunks` chunks of the target, one behind the other from address `target` on; what goes there are the segments from
 * address `segments` on, one behind the other, none of them empty; the digests go to address `digests`.
 */
struct run {
    uint64_t target, digests, segments, chunks;
};

/* Whether this processor has what the others need: they must not be called where it has not. */
EXPORT int snapshotd_is_supported(void);

EXPORT void snapshotd_copy_digest(const struct run *runs, size_t count);

/* The digests of `chunks` chunks, one behind the other. */
EXPORT void snapshotd_digest(const uint8_t *source, size_t chunks, uint64_t *digests);

#if defined(__x86_64__)
#include <immintrin.h>

#define STRIPES 16 /* of a block: (the secret's 192 bytes - STRIPE_BYTES) / 8 */
#define BLOCK_BYTES (STRIPES * STRIPE_BYTES)
#define BLOCKS (CHUNK_BYTES / BLOCK_BYTES)
#define LANES 4
#define AHEAD_BYTES 512 /* of each lane are fetched; where nothing is, nothing happens */

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX1 0x165667919E3779F9ULL

static const uint64_t INITIAL[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                    PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
#define SCRAMBLE_SECRET (SECRET + sizeof SECRET - STRIPE_BYTES)
#define LAST_SECRET (SCRAMBLE_SECRET - 7)
#define MERGE_SECRET (SECRET + 11)

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE __attribute__((target("avx2"), always_inline)) static inline
#define UNROLLED _Pragma("GCC unroll 16")
#define PARTS 2 /* of a stripe, in vectors */
#define PART_BYTES 32

static uint64_t word_at(const uint8_t *place) {
    uint64_t word;
    memcpy(&word, place, sizeof word);
    return word;
}

static uint64_t fold_product(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merge(const uint64_t *acc) {
    uint64_t hash = CHUNK_BYTES * PRIME64_1;
    for (int i = 0; i < 8; i += 2) {
        const uint8_t *secret = MERGE_SECRET + 8 * i;
        hash += fold_product(acc[i] ^ word_at(secret), acc[i + 1] ^ word_at(secret + 8));
    }
    hash ^= hash >> 37;
    hash *= PRIME_MX1;
    return hash ^ hash >> 32;
}

AVX2_INLINE __m256i load(const void *place) { return _mm256_loadu_si256((const __m256i *)place); }

AVX2_INLINE __m256i accumulate(__m256i acc, __m256i data, __m256i secret) {
    __m256i keyed = _mm256_xor_si256(data, secret);
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(product, _mm256_add_epi64(acc, swapped));
}

AVX2_INLINE __m256i scramble(__m256i acc, __m256i secret) {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

/* A chunk of the source, where it goes, and where its digest does. */
struct lane {
    uint8_t *target;
    const uint8_t *source;
    uint64_t *digest;
};

/* One chunk of each of `count` lanes, both constants; without `copies` there is no target. */
AVX2_INLINE void chunks_of(const struct lane *lanes, const int count, const int copies) {
    __m256i acc[LANES][PARTS];
    const uint8_t *source[LANES];
    uint8_t *target[LANES];
    UNROLLED for (int n = 0; n < count; n++) {
        source[n] = lanes[n].source;
        target[n] = lanes[n].target;
        UNROLLED for (int part = 0; part < PARTS; part++) acc[n][part] = load((const __m256i *)INITIAL + part);
    }
    for (int block = 0; block < BLOCKS; block++) {
        UNROLLED for (int stripe = 0; stripe < STRIPES; stripe++) {
            const int is_last = stripe == STRIPES - 1 && block == BLOCKS - 1;
            const uint8_t *secret = is_last ? LAST_SECRET : SECRET + 8 * stripe;
            UNROLLED for (int n = 0; n < count; n++) {
                const size_t begin = (size_t)stripe * STRIPE_BYTES;
                _mm_prefetch((const char *)source[n] + begin + AHEAD_BYTES, _MM_HINT_T0);
                UNROLLED for (int part = 0; part < PARTS; part++) {
                    const size_t at = begin + (size_t)part * PART_BYTES;
                    __m256i data = load(source[n] + at);
                    if (copies) _mm256_stream_si256((__m256i *)(target[n] + at), data);
                    acc[n][part] = accumulate(acc[n][part], data, load(secret + part * PART_BYTES));
                }
            }
        }
        UNROLLED for (int n = 0; n < count; n++) {
            source[n] += BLOCK_BYTES;
            if (copies) target[n] += BLOCK_BYTES;
            if (block == BLOCKS - 1) continue;
            UNROLLED for (int part = 0; part < PARTS; part++)
                acc[n][part] = scramble(acc[n][part], load(SCRAMBLE_SECRET + part * PART_BYTES));
        }
    }
    for (int n = 0; n < count; n++) {
        uint64_t words[8];
        for (int part = 0; part < PARTS; part++) _mm256_storeu_si256((__m256i *)words + part, acc[n][part]);
        *lanes[n].digest = merge(words);
    }
}

AVX2 static void copy_side_by_side(const struct lane *lanes) { chunks_of(lanes, LANES, 1); }
AVX2 static void copy_one(const struct lane *lane) { chunks_of(lane, 1, 1); }
AVX2 static void read_side_by_side(const struct lane *lanes) { chunks_of(lanes, LANES, 0); }
AVX2 static void read_one(const struct lane *lane) { chunks_of(lane, 1, 0); }

/* What is left of the segments of a run. */
struct cursor {
    const struct segment *segment;
    uint64_t used; /* bytes of the first one */
};

static void use(struct cursor *cursor, uint64_t nbytes) {
    cursor->used += nbytes;
    if (cursor->used == cursor->segment->nbytes) {
        cursor->segment++;
        cursor->used = 0;
    }
}

/* Bring a chunk that has bytes of several segments to its place. What is small stays in the cache, to be digested. */
static void gather(uint8_t *target, struct cursor *cursor) {
    for (uint64_t missing = CHUNK_BYTES; missing;) {
        uint64_t there = cursor->segment->nbytes - cursor->used;
        uint64_t nbytes = there < missing ? there : missing;
        memcpy(target, (const uint8_t *)(uintptr_t)cursor->segment->address + cursor->used, nbytes);
        target += nbytes;
        missing -= nbytes;
        use(cursor, nbytes);
    }
}

void snapshotd_copy_digest(const struct run *runs, size_t count) {
    struct lane lanes[LANES];
    int waiting = 0; /* lanes that wait for others to go side by side with, of this run or the next */
    for (const struct run *run = runs; run < runs + count; run++) {
        struct cursor cursor = {(const struct segment *)(uintptr_t)run->segments, 0};
        uint8_t *target = (uint8_t *)(uintptr_t)run->target;
        uint64_t *digest = (uint64_t *)(uintptr_t)run->digests;
        for (uint64_t chunk = 0; chunk < run->chunks; chunk++, target += CHUNK_BYTES, digest++) {
            if (cursor.segment->nbytes - cursor.used < CHUNK_BYTES) {
                gather(target, &cursor);
                read_one(&(struct lane){NULL, target, digest});
                continue;
            }
            const uint8_t *source = (const uint8_t *)(uintptr_t)cursor.segment->address + cursor.used;
            lanes[waiting++] = (struct lane){target, source, digest};
            use(&cursor, CHUNK_BYTES);
            if (waiting == LANES) {
                copy_side_by_side(lanes);
                waiting = 0;
            }
        }
    }
    for (int n = 0; n < waiting; n++) copy_one(lanes + n);
    _mm_sfence();
}

void snapshotd_digest(const uint8_t *source, size_t chunks, uint64_t *digests) {
    for (; chunks >= LANES; chunks -= LANES) {
        struct lane lanes[LANES];
        for (int n = 0; n < LANES; n++, source += CHUNK_BYTES) lanes[n] = (struct lane){NULL, source, digests++};
        read_side_by_side(lanes);
    }
    for (; chunks; chunks--, source += CHUNK_BYTES) read_one(&(struct lane){NULL, source, digests++});
}

int snapshotd_is_supported(void) { return __builtin_cpu_supports("avx2"); }

#else

int snapshotd_is_supported(void) { return 0; }

void snapshotd_copy_digest(const struct run *runs, size_t count) { (void)runs, (void)count; }

void snapshotd_digest(const uint8_t *source, size_t chunks, uint64_t *digests) {
    (void)source, (void)chunks, (void)digests;
}

#endif
