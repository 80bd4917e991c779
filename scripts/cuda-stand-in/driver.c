// A CUDA driver without a device that does nothing and succeeds, and counts what it is asked for: what a program
// takes of the host can be seen without a GPU. Memory is addresses; copies from and to the host are made, and nothing
// else moves a byte. scripts/cuda-host-work.sh adds every other name of the driver's header, as calls that succeed.
//
// Between cuProfilerStart and cuProfilerStop calls are counted; each such range becomes one line of JSON in the file
// that COUNTS names: how long it took, the calls, the kernels that were started, and the last call.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef struct counter {
  const char *name;
  long count;
  struct counter *next;
} counter;

static counter *calls, *kernels;
static const char *last = "";
static int counting;
static struct timespec began;

// Counts a call for the range under way. One thread starts the work of a range.
void stand_in_count(counter *of) {
  if (!counting) return;
  if (!of->count++) {
    of->next = calls;
    calls = of;
  }
  last = of->name;
}

#define COUNTED                          \
  do {                                   \
    static counter of_this = {__func__}; \
    stand_in_count(&of_this);            \
  } while (0)

enum { SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, UNSUPPORTED = 801, NOT_RECORDED = 900, BROKEN = 901 };
typedef uint64_t address;

static void list(FILE *to, counter **all) {
  const char *comma = "";
  for (counter *at = *all; at;) {
    fprintf(to, "%s\"%s\": %ld", comma, at->name, at->count);
    comma = ", ";
    counter *next = at->next;
    at->count = 0;
    at->next = 0;
    at = next;
  }
  *all = 0;
}

int cuProfilerStart(void) {
  clock_gettime(CLOCK_MONOTONIC, &began);
  counting = 1;
  return SUCCESS;
}

int cuProfilerStop(void) {
  struct timespec ended;
  clock_gettime(CLOCK_MONOTONIC, &ended);
  const char *path = getenv("COUNTS");
  FILE *to = counting && path ? fopen(path, "a") : 0;
  counting = 0;
  if (!to) return SUCCESS;
  double us = (ended.tv_sec - began.tv_sec) * 1e6 + (ended.tv_nsec - began.tv_nsec) / 1e3;
  fprintf(to, "{\"us\": %.1f, \"last\": \"%s\", \"calls\": {", us, last);
  list(to, &calls);
  fprintf(to, "}, \"kernels\": {");
  list(to, &kernels);
  fprintf(to, "}}\n");
  return fclose(to);
}

// The device: a Hopper.

int cuInit(unsigned flags) { COUNTED; return SUCCESS; }
int cuDriverGetVersion(int *version) { COUNTED; *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { COUNTED; *text = "a stand-in"; return SUCCESS; }
int cuGetErrorName(int error, const char **text) { COUNTED; *text = "a stand-in"; return SUCCESS; }
int cuDeviceGet(int *device, int index) { COUNTED; *device = index; return index ? 101 : SUCCESS; }
int cuDeviceGetCount(int *count) { COUNTED; *count = 1; return SUCCESS; }
int cuDeviceGetName(char *name, int room, int device) {
  COUNTED;
  snprintf(name, room, "stand-in");
  return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  COUNTED;
  switch (attribute) {
    case 16: *value = 132; break;        // multiprocessors
    case 75: *value = 9; break;          // compute capability
    case 76: *value = 0; break;
    case 81: *value = 228 << 10; break;  // shared memory of a multiprocessor
    case 97: *value = 227 << 10; break;  // shared memory that a block may ask for
    case 115: *value = 1; break;         // memory pools
    default: *value = 0;
  }
  return SUCCESS;
}

static _Thread_local void *current;
static char context, stream, event, module, pool;

int cuDevicePrimaryCtxRetain(void **to, int device) { COUNTED; *to = &context; return SUCCESS; }
int cuCtxGetCurrent(void **to) { COUNTED; *to = current; return SUCCESS; }
int cuCtxSetCurrent(void *of) { COUNTED; current = of; return SUCCESS; }
int cuStreamCreate(void **to, unsigned flags) { COUNTED; *to = &stream; return SUCCESS; }
int cuStreamCreateWithPriority(void **to, unsigned flags, int priority) { COUNTED; *to = &stream; return SUCCESS; }
int cuEventCreate(void **to, unsigned flags) { COUNTED; *to = &event; return SUCCESS; }
int cuEventElapsedTime(float *ms, void *from, void *to) { COUNTED; *ms = 1; return SUCCESS; }
int cuEventElapsedTime_v2(float *ms, void *from, void *to) { COUNTED; *ms = 1; return SUCCESS; }
int cuGetProcAddress_v2(const char *name, void **to, int version, uint64_t flags, int *status) {
  COUNTED;
  return UNSUPPORTED;
}

// Recording: what is queued becomes nodes of a graph. Waits, questions and memory that is not in the order of the stream
// break it, as in a driver.

enum { KERNEL = 0, COPY = 1, FILL = 2, TAKE = 10, GIVE_BACK = 11 };
enum { HOST = 1, DEVICE = 2 };
typedef struct node {
  int kind, from, to, free;
  address at;
  size_t bytes;
} node;
typedef struct {
  node *nodes;
  size_t count, room;
  int ready;
} graph;
static graph *recording;
static int broken;

// Whether this is the call that FAILS names.
static int fails(const char *name) {
  const char *failing = getenv("FAILS");
  return failing && !strcmp(failing, name);
}

// Adds a node where something is recorded; whether it is.
static int recorded(node added) {
  if (!recording) return 0;
  if (recording->count == recording->room) {
    recording->room = 2 * recording->room + 64;
    recording->nodes = realloc(recording->nodes, recording->room * sizeof(node));
  }
  recording->nodes[recording->count++] = added;
  return 1;
}

static int waits(void) {
  if (!recording) return SUCCESS;
  broken = 1;
  return NOT_RECORDED;
}

int cuStreamBeginCapture_v2(void *of, int mode) {
  COUNTED;
  if (recording || fails(__func__)) return NOT_RECORDED;
  recording = calloc(1, sizeof(graph));
  broken = 0;
  return SUCCESS;
}
int cuStreamEndCapture(void *of, graph **to) {
  COUNTED;
  broken |= fails(__func__);
  *to = broken ? 0 : recording;
  recording = 0;
  return broken ? BROKEN : SUCCESS;
}
int cuStreamIsCapturing(void *of, int *status) { COUNTED; *status = recording != 0; return SUCCESS; }
int cuStreamSynchronize(void *of) { COUNTED; return waits(); }
int cuStreamQuery(void *of) { COUNTED; return waits(); }
int cuCtxSynchronize(void) { COUNTED; return waits(); }
int cuEventSynchronize(void *of) { COUNTED; return waits(); }
int cuEventQuery(void *of) { COUNTED; return waits(); }
int cuGraphGetNodes(graph *of, node **to, size_t *count) {
  COUNTED;
  for (size_t i = 0; to && i < of->count && i < *count; i++) to[i] = of->nodes + i;
  *count = of->count;
  return SUCCESS;
}
int cuGraphNodeGetType(const node *of, int *kind) { COUNTED; *kind = of->kind; return SUCCESS; }
int cuGraphMemFreeNodeGetParams(const node *of, address *at) { COUNTED; *at = of->at; return SUCCESS; }
// As the header has them: properties of a pool, who has access, then size and place; offsets, level and kind of memory.
int cuGraphMemAllocNodeGetParams(const node *of, uint64_t *to) { COUNTED; to[13] = of->bytes; to[14] = of->at; return SUCCESS; }
int cuGraphMemcpyNodeGetParams(const node *of, uint32_t *to) { COUNTED; to[8] = of->from; to[30] = of->to; return SUCCESS; }
int cuGraphInstantiateWithFlags(graph **to, graph *of, uint64_t flags) {
  COUNTED;
  if (fails(__func__)) return OUT_OF_MEMORY;
  of->ready = 1;
  *to = of;
  return SUCCESS;
}
int cuGraphUpload(graph *of, void *on) { COUNTED; return !of->ready ? INVALID : fails(__func__) ? OUT_OF_MEMORY : SUCCESS; }
int cuGraphLaunch(graph *of, void *on) { COUNTED; return !of->ready ? INVALID : fails(__func__) ? OUT_OF_MEMORY : SUCCESS; }
int cuGraphDestroy(graph *of) { COUNTED; free(of->nodes); free(of); return SUCCESS; }
int cuDeviceGetGraphMemAttribute(int device, int attribute, uint64_t *to) { COUNTED; *to = 0; return SUCCESS; }

// Memory: each allocation has addresses of its own, which the system backs where they are written.

#define ROOM ((size_t)4 << 40)
static char *memory;
static size_t taken;

static int take(address *to, size_t bytes) {
  if (!memory) {
    void *room = mmap(0, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return OUT_OF_MEMORY;
    memory = room;
  }
  bytes = (bytes + 511) & ~(size_t)511;
  size_t at = __atomic_fetch_add(&taken, bytes, __ATOMIC_RELAXED);
  *to = (address)(memory + at);
  return at + bytes > ROOM ? OUT_OF_MEMORY : SUCCESS;
}

int cuMemAllocAsync(address *to, size_t bytes, void *on) {
  COUNTED;
  // What a recording gave back it takes again.
  for (size_t i = 0; recording && i < recording->count; i++)
    if (recording->nodes[i].free && recording->nodes[i].bytes == bytes) {
      recording->nodes[i].free = 0;
      *to = recording->nodes[i].at;
      recorded((node){TAKE, .at = *to, .bytes = bytes});
      return SUCCESS;
    }
  int taken = take(to, bytes);
  if (!taken) recorded((node){TAKE, .at = *to, .bytes = bytes});
  return taken;
}
int cuMemFreeAsync(address at, void *on) {
  COUNTED;
  for (size_t i = 0; recording && i < recording->count; i++)
    if (recording->nodes[i].kind == TAKE && recording->nodes[i].at == at) {
      recorded((node){GIVE_BACK, .free = 1, .at = at, .bytes = recording->nodes[i].bytes});
      return SUCCESS;
    }
  // What was taken before cannot be given back within a recording.
  if (recording) broken = 1;
  return recording ? INVALID : SUCCESS;
}
int cuMemAlloc_v2(address *to, size_t bytes) { COUNTED; return waits() ?: take(to, bytes); }
int cuMemsetD8Async(address to, int value, size_t count, void *on) { COUNTED; recorded((node){FILL}); return SUCCESS; }
int cuMemcpyDtoDAsync_v2(address to, address from, size_t bytes, void *on) {
  COUNTED;
  recorded((node){COPY, DEVICE, DEVICE});
  return SUCCESS;
}
int cuMemHostAlloc(void **to, size_t bytes, unsigned flags) { COUNTED; *to = calloc(1, bytes); return SUCCESS; }
int cuMemFreeHost(void *at) { COUNTED; free(at); return SUCCESS; }
int cuMemHostGetDevicePointer_v2(address *to, void *of, unsigned flags) {
  COUNTED;
  *to = (address)of;
  return fails(__func__) ? UNSUPPORTED : SUCCESS;
}
int cuMemGetInfo_v2(size_t *free, size_t *all) { COUNTED; *free = *all = (size_t)80 << 30; return SUCCESS; }
int cuDeviceTotalMem_v2(size_t *all, int device) { COUNTED; *all = (size_t)80 << 30; return SUCCESS; }
int cuDeviceGetDefaultMemPool(void **to, int device) { COUNTED; *to = &pool; return SUCCESS; }
int cuMemPoolGetAttribute(void *of, int attribute, void *to) { COUNTED; *(uint64_t *)to = 0; return SUCCESS; }

static int copied(void *to, const void *from, size_t bytes) {
  memcpy(to, from, bytes);
  return SUCCESS;
}

int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { COUNTED; return copied(to, from, bytes); }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *on) {
  COUNTED;
  return recorded((node){COPY, HOST, DEVICE}) ? SUCCESS : copied(to, from, bytes);
}
int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { COUNTED; return waits() ?: copied(to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *on) {
  COUNTED;
  return recorded((node){COPY, DEVICE, HOST}) ? SUCCESS : copied(to, from, bytes);
}

// Kernels: a function is the counter of its starts.

// A driver compiles a module that is text. The first kernel of each is a line of the file that MODULES names.
int cuModuleLoadData(void **to, const void *image) {
  COUNTED;
  *to = &module;
  const char *path = getenv("MODULES"), *text = image;
  if (!path || strncmp(text, "//", 2)) return SUCCESS;
  const char *entry = strstr(text, ".entry ");
  FILE *file = entry ? fopen(path, "a") : 0;
  if (!file) return SUCCESS;
  entry += strlen(".entry ");
  fprintf(file, "%.*s\n", (int)strcspn(entry, "(\n"), entry);
  return fclose(file);
}

int cuModuleLoad(void **to, const char *path) { COUNTED; *to = &module; return SUCCESS; }

int cuModuleGetFunction(void **to, void *of, const char *name) {
  COUNTED;
  static counter functions[4096];
  static int count;
  int i = 0;
  while (i < count && strcmp(functions[i].name, name)) i++;
  if (i == 4096) return INVALID;
  if (i == count) functions[count++].name = strdup(name);
  *to = functions + i;
  return SUCCESS;
}

// The one kernel that is run, for the product in fp8 that the program tries first: rows of bf16 as e4m3 with a scale
// each. Its arguments as in kernels/linear.cu.
struct float8_rows {
  const uint16_t *x;
  uint8_t *out;
  float *scales;
  int64_t rows, depth;
};

static float widened(uint16_t bf16) {
  union { uint32_t bits; float number; } x = {(uint32_t)bf16 << 16};
  return x.number;
}

static uint8_t e4m3(float x) {
  union { float number; uint32_t bits; } size = {__builtin_fabsf(x)};
  uint8_t sign = x < 0 ? 0x80 : 0;
  if (size.number < 1.0f / 64) return sign | (uint8_t)__builtin_rintf(size.number * 512);
  uint32_t code = ((size.bits + (1 << 19) - 1 + (size.bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  return sign | (code < 0x7e ? code : 0x7e);
}

static void run_float8_rows(const struct float8_rows *of) {
  if (of->rows * of->depth > 1 << 14) return;
  for (int64_t row = 0; row < of->rows; row++) {
    const uint16_t *x = of->x + row * of->depth;
    float most = 0;
    for (int64_t k = 0; k < of->depth; k++) most = __builtin_fmaxf(most, __builtin_fabsf(widened(x[k])));
    of->scales[row] = most / 448;
    for (int64_t k = 0; k < of->depth; k++)
      of->out[row * of->depth + k] = e4m3(most > 0 ? widened(x[k]) * (448 / most) : 0);
  }
}

static int start(counter *kernel) {
  if (recorded((node){KERNEL})) return SUCCESS;
  if (counting && !kernel->count++) {
    kernel->next = kernels;
    kernels = kernel;
  }
  return SUCCESS;
}

int cuLaunchKernel(void *kernel) { COUNTED; return start(kernel); }
int cuLaunchKernelEx(const void *config, void *kernel, void **arguments) {
  COUNTED;
  if (!recording && !strncmp(((counter *)kernel)->name, "float8_rows", 11)) run_float8_rows(arguments[0]);
  return start(kernel);
}

int cuTensorMapEncodeTiled(void *map) { COUNTED; memset(map, 0, 128); return SUCCESS; }
