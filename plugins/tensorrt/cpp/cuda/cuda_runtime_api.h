// TensorRT's headers need only two opaque handles of CUDA. The plugins call the driver API directly.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
