// All that TensorRT's headers need of CUDA's: two opaque handles. The plugins call the driver, by its own names.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
