// IEEE binary16.
#pragma once
#include "kv_format/wide.cuh"

struct F16 : WideFormat<HalfOperand> {};
