/* A CUDA runtime without a GPU, for ONNX Runtime's CUDA provider: memory is the host's, copies copy, and kernels are counted and not
   run. So sessions open, nodes are placed, kernels are chosen and graphs recorded as on a GPU; numbers mean nothing. fake_cuda.py gives
   every function that is not here a body that says it worked. Types and layouts are those of CUDA 13. */

#include <stdlib.h>
#include <string.h>

enum { LAUNCHES, TO_DEVICE, TO_HOST, ON_DEVICE, RECORDED, REPLAYED, KINDS };
static long counted[KINDS];
static int recording;

long fake_counted(int kind) { return counted[kind]; }
void fake_forget(void) { memset(counted, 0, sizeof counted); }

/* The device: one of capability 8.9. */

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaMemGetInfo(size_t *free, size_t *all) { *free = *all = (size_t)64 << 30; return 0; }

#define FIELD(type, offset) *(type *)((char *)properties + offset)
int cudaGetDeviceProperties(void *properties, int device)
{
    memset(properties, 0, 1008);
    strcpy(properties, "none");
    FIELD(size_t, 288) = (size_t)64 << 30; /* memory */
    FIELD(size_t, 296) = 48 << 10;         /* shared by a block */
    FIELD(int, 304) = 65536;               /* registers of a block */
    FIELD(int, 308) = 32;                  /* threads of a warp */
    FIELD(int, 320) = 1024;                /* of a block */
    for (int axis = 0; axis < 3; axis++) FIELD(int, 336 + 4 * axis) = 65535; /* blocks of a grid */
    FIELD(int, 360) = 8;
    FIELD(int, 364) = 9;
    FIELD(int, 384) = 128;         /* multiprocessors */
    FIELD(int, 596) = 72 << 20;    /* L2 */
    FIELD(int, 604) = 1536;        /* threads of a multiprocessor */
    FIELD(size_t, 624) = 100 << 10; /* shared by it */
    FIELD(int, 632) = 65536;       /* registers of it */
    FIELD(size_t, 672) = 99 << 10; /* shared by a block that asks for it */
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    switch (attribute) {
    case 75: *value = 8; return 0;
    case 76: *value = 9; return 0;
    case 16: *value = 128; return 0;
    case 97: *value = 99 << 10; return 0;
    case 8: *value = 48 << 10; return 0;
    case 10: *value = 32; return 0;
    default: *value = 1024; return 0;
    }
}

int cudaFuncGetAttributes(void *attributes, const void *kernel)
{
    memset(attributes, 0, 144);
    *(int *)((char *)attributes + 24) = 1024; /* threads of a block */
    *(int *)((char *)attributes + 44) = 99 << 10;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared, unsigned flags)
{
    *blocks = 2;
    return 0;
}

/* Memory. */

static int take(void **address, size_t size)
{
    *address = aligned_alloc(512, (size + 511) / 512 * 512);
    if (*address) memset(*address, 0, size);
    return *address ? 0 : 2;
}
int cudaMalloc(void **address, size_t size) { return take(address, size); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return take(address, size); }
int cudaMallocHost(void **address, size_t size) { return take(address, size); }
int cudaFree(void *address) { free(address); return 0; }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaPointerGetAttributes(void *attributes, const void *address)
{
    memset(attributes, 0, 88);
    *(int *)attributes = 2; /* of the device */
    return 0;
}

static void count_copy(int kind) { counted[kind == 1 ? TO_DEVICE : kind == 2 ? TO_HOST : ON_DEVICE]++; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { count_copy(kind); memmove(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return cudaMemcpy(to, from, size, kind); }
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind, void *stream)
{
    count_copy(kind);
    for (size_t row = 0; row < height; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
    return 0;
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return 0; }

/* Handles: anything that is not null. */

static int handle(void **made) { *made = malloc(64); return 0; }
int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
void **__cudaRegisterFatBinary(void *binary) { return malloc(64); }
int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
const char *cudaGetErrorName(int error) { return "none"; }
const char *cudaGetErrorString(int error) { return "there is no GPU"; }

/* Kernels, and graphs of them. Waiting for the GPU while recording is an error on one, and so here. */

int cudaLaunchKernel() { counted[LAUNCHES]++; return 0; }
int __cudaLaunchKernel() { counted[LAUNCHES]++; return 0; }
int cudaLaunchKernelExC() { counted[LAUNCHES]++; return 0; }
int cudaLaunchCooperativeKernel() { counted[LAUNCHES]++; return 0; }
int cudaStreamBeginCapture(void *stream, int mode) { recording = 1; return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { recording = 0; counted[RECORDED]++; return handle(graph); }
int cudaStreamIsCapturing(void *stream, int *status) { *status = recording; return 0; }
int cudaStreamSynchronize(void *stream) { return recording ? 900 : 0; }
int cudaDeviceSynchronize(void) { return recording ? 900 : 0; }
int cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) { return handle(ready); }
int cudaGraphLaunch(void *ready, void *stream) { counted[REPLAYED]++; return 0; }
