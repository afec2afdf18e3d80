// What is compiled once for each instruction set.
#include "levels.hpp"
#include "quantize.hpp"
#include "rows.hpp"
#include "partial.hpp"
#include "write.hpp"
#include "panels.hpp"
#include "attend.hpp"
#include "norm.hpp"
#if COMPRESSOR_LEVEL == 2
#include "exact.hpp"
#include "panels_bf16.hpp"
#endif
#include "levels_run.hpp"
#include "rows_run.hpp"
#include "choose.hpp"
