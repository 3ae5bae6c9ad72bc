// A fake CUDA driver that prints the requested launches to stdout. FAKE_SM is its GPU's compute capability. FAKE_FAIL
// names a function that fails. FAKE_OLD is a driver that does not know images of compute capability 9.0 and later.
// While FAKE_CAPTURES is set, a stream is under capture, and what waits fails. The first word of an image is its name.
// The number of ".param ." in it is its number of parameters, as in PTX.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[64];
  char* image;
} Function;

static int status(const char* function) {
  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
  if (getenv("FAKE_CAPTURES") && strncmp(function, "cuLaunchKernel", 14) != 0) return 900;
  const char* failing = getenv("FAKE_FAIL");
  return failing && strcmp(failing, function) == 0 ? 719 : 0;
}

static int said(const char* function) {
  printf("\n");
  fflush(stdout);
  return status(function);
}

int cuInit(unsigned flags) { return (int)(flags * 0); }

int cuDriverGetVersion(int* version) { return *version = 13000, 0; }

int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* result) {
  (void)version, (void)flags;
  *found = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *found ? 0 : 1;
  return 0;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : error == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : NULL;
  return *name ? 0 : 1;
}

int cuCtxGetCurrent(void** context) { return *context = (void*)16, 0; }

int cuCtxGetDevice(int* device) { return *device = 3, 0; }

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int sm = atoi(getenv("FAKE_SM"));
  if (device != 3) return 101;
  return *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1, 0;
}

// The launchers allocate nothing and wait for nothing. If one does, a call under capture fails.
int cuMemAlloc_v2(void** address, size_t size) {
  printf("allocate %zu", size);
  *address = (void*)4096;
  return said(__func__);
}

int cuStreamSynchronize(void* stream) {
  printf("wait for %p", stream);
  return said(__func__);
}

int cuCtxSynchronize(void) {
  printf("wait");
  return said(__func__);
}

int cuModuleLoadData(void** module, const void* image) {
  const int sm = atoi(strcspn(image, "-") < strcspn(image, " ") ? (const char*)image + strcspn(image, "-") + 1 : "0");
  *module = strdup(image);
  printf("load %.*s", (int)strcspn(image, " \n"), (const char*)image);
  if (getenv("FAKE_OLD") && sm >= 90) return said(__func__) ? 900 : 200;
  return said(__func__);
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  Function* found = calloc(1, sizeof *found);
  strncpy(found->name, name, sizeof found->name - 1);
  found->image = module;
  *function = found;
  printf("function %s of %.*s", name, (int)strcspn(module, " \n"), found->image);
  return said(__func__);
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  printf("%s attribute %d = %d", ((Function*)function)->name, attribute, value);
  return said(__func__);
}

// As in CUDA's header, without the attributes that are not used.
typedef struct {
  int id, padding;
  union {
    int programmatic_stream_serialization;
    uint64_t bytes[8];
  } value;
} LaunchAttribute;

typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned count;
} LaunchConfig;

static void print_launch(const Function* kernel, const LaunchConfig* config, void** parameters, void** extra) {
  printf("launch %s of %.*s grid %u %u %u block %u %u %u shared %u stream %p extra %p", kernel->name,
         (int)strcspn(kernel->image, " \n"), kernel->image, config->gx, config->gy, config->gz, config->bx, config->by,
         config->bz, config->shared, config->stream, (void*)extra);
  for (unsigned i = 0; i < config->count; ++i)
    printf(" attribute %d = %d", config->attributes[i].id,
           config->attributes[i].value.programmatic_stream_serialization);
  printf(":");
  for (const char* at = kernel->image; (at = strstr(at, ".param .")); ++at) {
    uint64_t cell;
    memcpy(&cell, *parameters++, 8);
    printf(" %llx", (unsigned long long)cell);
  }
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const LaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
  print_launch(function, &config, parameters, extra);
  return said(__func__);
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  print_launch(function, config, parameters, extra);
  return said(__func__);
}
