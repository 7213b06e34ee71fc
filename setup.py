"""Builds kernels.native, the C++ half of the CPU kernels, where a compiler and MLX are at hand.

Without them, or when compiling fails, the install goes on without it: kernels.backend says so once
at run time and the pure-MLX fallbacks take over. STREAMER_BUILD_KERNELS=off skips it on purpose.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels", "cpu")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
MLX_MACOS = "14.0"  # the oldest that MLX's wheels are for
VECTORS = ("steps", "attend", "codes")  # in the compiler's own vectors
VNNI = [*AVX512, "-mavx512vnni"]
X86 = {
    "avx2": AVX2,
    "madd": AVX2,
    "levels": AVX2,
    "maddubs": AVX2,
    "avxvnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "vnni": VNNI,
    "vbmi": [*VNNI, "-mavx512vbmi"],
    "amx": [*VNNI, "-mgfni", "-mamx-tile", "-mamx-int8"],
    "tiles": [*VNNI, "-mavx512vbmi", "-mamx-tile", "-mamx-int8"],
}
ARM = {"dot": ["-march=armv8.2-a+dotprod"], "i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
ARM_PRODUCTS = {"dot": "sdot", "i8mm": "smmla"}
SETS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


def flags(source: str) -> list[str]:
    """The compiler's flags for one source: only those named by a set may use more than
    the least CPU has, and run-time dispatch keeps them from others."""
    common = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing", "-pthread"]
    if source.endswith("nanobind.cpp"):
        return [*common, "-DNDEBUG", "-w"]
    part, _, isa = Path(source).stem.partition("_")
    # sources say what is fused (fused.h): compilers differ, and rows would too
    common.append("-ffp-contract=off")
    # or GCC keeps a loop that chooses between two floats (silu) value by value
    common.append("-fno-trapping-math")
    common.append("-w" if part in ("rows", *VECTORS) else "-Wall")
    if part in ("rows", *VECTORS):
        common += SETS.get(platform.machine().lower(), {}).get(isa, [])
    return common


class BuildKernels(build_ext):
    """Compiles each source with its own flags, all at once."""

    def knows(self, instruction: str, flags: list[str]) -> bool:
        """Whether compiler and assembler have an instruction; without it that set is left out."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "instruction.cpp")
            source.write_text(f'void run() {{ asm volatile("{instruction}"); }}')
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=flags)
            except CompileError:
                return False
            return True

    def choose_flags(self) -> None:
        """Sources for what the compiler has not compile to nothing."""
        known = SETS.get(platform.machine().lower())
        if known is X86:
            if not self.knows("tilerelease", X86["amx"]):
                X86["amx"] = X86["tiles"] = VNNI
            if not self.knows("{vex} vpdpbusd %ymm0, %ymm0, %ymm0", X86["avxvnni"]):
                X86["avxvnni"] = AVX2
        elif known is ARM:
            for part, product in ARM_PRODUCTS.items():
                if not self.knows(f"{product} v0.4s, v1.16b, v2.16b", ARM[part]):
                    ARM[part] = []

    def build_extension(self, ext: Extension) -> None:
        self.choose_flags()
        if self.inplace or self.editable_mode:
            # what older sources gave must not stand in for these where they don't compile
            *folders, name = ext.name.split(".")
            for older in Path(*folders).glob(f"{name}.*.so"):
                older.unlink()

        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags(source),
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            objects = [o for batch in workers.map(compiled, ext.sources) for o in batch]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            build_temp=self.build_temp,
            target_lang="c++",
        )


def for_this_mac() -> None:
    """For this Mac's CPU and a macOS that MLX runs on, unless the environment says otherwise.
    Python's own settings may be for Intel's too, and for a macOS too old for C++20."""
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    configured = str(sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET") or "")
    least = max(MLX_MACOS, configured, key=lambda v: [int(n) for n in v.split(".") if n])
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", least)


def extensions() -> list[Extension]:
    """The extension, or nothing where its headers are missing."""
    if os.environ.get("STREAMER_BUILD_KERNELS", "on") == "off":
        return []
    folders = {}
    for name in ("mlx", "nanobind"):
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            print(f"kernels: not built, there is no {name} here", file=sys.stderr)
            return []
        folders[name] = Path(next(iter(found.submodule_search_locations)))
    if sys.platform == "darwin":
        for_this_mac()
    mlx, bind = folders["mlx"], folders["nanobind"]
    here = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    return [
        Extension(
            "kernels.native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            include_dirs=[
                str(mlx / "include"),
                str(bind / "include"),
                str(bind / "src"),
                str(bind / "ext" / "robin_map" / "include"),
                str(SOURCES),
            ],
            # MLX's own types are found by domain: without it arrays are refused.
            define_macros=[("NB_DOMAIN", "mlx")],
            libraries=["mlx"],
            library_dirs=[str(mlx / "lib")],
            extra_link_args=[
                "-pthread",
                f"-Wl,-rpath,{here}/../mlx/lib",
                *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]),
            ],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
