// What every processor of the kind has (SSE2, NEON): registers of 4 floats, 16 of them at least.
#include <cmath>
#include <cstring>

#include "abi.h"
#include "kernels.h"

#define VECTOR 4
#define ROWS 6
#define COLUMNS 2
#include "kernels.inc"

namespace depthfuse {
extern const Kernels kBaseline = kernels_named("baseline");
}  // namespace depthfuse
