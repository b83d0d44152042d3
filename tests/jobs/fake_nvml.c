/* The functions of NVIDIA's NVML that jobs/gpus.py asks, for a node with two GPUs, the second of
   which tells only of its memory, as a part of a GPU (MIG) does. */
#include <stdint.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } utilization_t;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };

int nvmlInitWithFlags(unsigned int flags) { return flags ? INVALID_ARGUMENT : SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }

/* Handles above 32 bits, as real ones are. */
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    if (index > 1) return INVALID_ARGUMENT;
    *device = (void *)(uintptr_t)(0x7f0000001000ull + index);
    return SUCCESS;
}

static int index_of(void *device) { return (int)((uintptr_t)device - 0x7f0000001000ull); }

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = 80000000000ull;
    memory->used = 20000000000ull * (1 + index_of(device));
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) {
    if (index_of(device)) return NOT_SUPPORTED;
    rates->gpu = 93;
    rates->memory = 41;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts) {
    if (index_of(device)) return NOT_SUPPORTED;
    *milliwatts = 350000;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned int *milliwatts) {
    if (index_of(device)) return NOT_SUPPORTED;
    *milliwatts = 700000;
    return SUCCESS;
}
