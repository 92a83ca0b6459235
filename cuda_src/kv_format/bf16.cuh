// bfloat16: the upper half of a float.
#pragma once
#include "kv_format/wide.cuh"

struct BF16 : WideFormat<BFloatOperand> {};
