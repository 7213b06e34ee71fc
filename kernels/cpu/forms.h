// Weights in the form that the kernels take: of 2 and 3 bits as nibbles, of 5 and 6 as bytes, of
// mxfp8 and nvfp4 as floats, and of mxfp4 as affine ones where the instruction set knows them so.
#pragma once

#include "rows.h"

namespace streamer {

// The matrix as the kernels see it, which may be as it is; its pointers are the other's.
Matrix form_of(const Matrix& matrix);

// Bytes that form_rows makes for a row; none where all lies where the kernels read it.
int64_t form_bytes(const Matrix& matrix, const Matrix& form);

// The form with pointers to rows [begin, end), as if to all of them, in this thread's memory.
Matrix form_rows(const Matrix& matrix, const Matrix& form, int64_t begin, int64_t end);

} // namespace streamer
