// The sums of a wgmma as asm statements name them: QL_WGMMA_SUMS_n are n operands that are read and written, an array d;
// QL_WGMMA_NAMES_n are their names, %0 and on. An instruction of N columns has N / 2 sums a thread.
#pragma once

#define QL_WGMMA_SUMS_AT(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QL_WGMMA_SUMS_16_AT(i) QL_WGMMA_SUMS_AT(i), QL_WGMMA_SUMS_AT(i + 8)
#define QL_WGMMA_SUMS_32_AT(i) QL_WGMMA_SUMS_16_AT(i), QL_WGMMA_SUMS_16_AT(i + 16)
#define QL_WGMMA_SUMS_8 QL_WGMMA_SUMS_AT(0)
#define QL_WGMMA_SUMS_16 QL_WGMMA_SUMS_16_AT(0)
#define QL_WGMMA_SUMS_32 QL_WGMMA_SUMS_32_AT(0)
#define QL_WGMMA_SUMS_64 QL_WGMMA_SUMS_32_AT(0), QL_WGMMA_SUMS_32_AT(32)

#define QL_WGMMA_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QL_WGMMA_NAMES_16 QL_WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QL_WGMMA_NAMES_32 \
    QL_WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QL_WGMMA_NAMES_64                                                                                         \
    QL_WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49," \
                      " %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
