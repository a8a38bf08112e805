#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Holds the tree to the rules of CONTRIBUTING.md: module table, sizes, licence headers, files only where they belong.

usage: check_tree.py includes|sizes|headers|words ROOT
Prints every violation as FILE:LINE: text and exits 1.
"""
import pathlib
import re
import subprocess
import sys

# What each module may include, itself aside; the column is transitive.
MODULES = {
    "base": [], "text": ["base"], "recipe": ["base"], "plan": ["recipe"], "data": ["text", "recipe"], "launch": ["plan"],
    "metrics": ["plan"], "kernels": ["base"], "device": ["base"], "comm": ["device"], "mesh": ["comm", "plan"], "param": ["plan", "device"],
    "ops": ["param", "device", "kernels"], "nn": ["ops"], "parallel": ["nn", "mesh"], "optim": ["parallel"], "checkpoint": ["mesh"],
    "engine": ["optim"], "infer": ["engine", "checkpoint", "text"],
    "trainer": ["infer", "data", "launch", "metrics"],
}
TORCH_FREE = {"base", "text", "recipe", "plan", "data", "launch", "metrics", "kernels"}
TORCH_FREE_FILES = {"src/checkpoint/" + f for f in ("safetensors.cpp", "manifest.cpp", "commit.cpp", "load.cpp")}
TORCH_INCLUDE = re.compile(r"(ATen|c10|torch|caffe2)/")
NARROW = {"ATen/core/Tensor.h", "ATen/core/ScalarType.h", "c10/core/ScalarType.h", "c10/core/Device.h"}
PRIVATE_ONLY = re.compile(r"(yaml-cpp|CLI|spdlog|nccl|mpi|cuda_runtime|pcre2|zstd|zlib|protozero)[./]")
HEADER_LINES, SOURCE_LINES, FUNCTION_LINES, TEST_FUNCTION_LINES = 200, 500, 100, 150  # tests hold tables of cases
GENERATED = {"src/text/unicode_tables.cpp"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')


def tracked(root, *patterns):
    """Files git knows or would add, so that build folders and downloads never count."""
    listing = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard", "--", *patterns],
                             capture_output=True, text=True)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:  # an exported tree without git
        top = [d for d in pathlib.Path(root).iterdir() if d.name not in (".git", ".deps", ".cache", "build", "data", "runs")]
        names = [str(f.relative_to(root)) for d in top for f in ([d] if d.is_file() else d.rglob("*")) if f.is_file()]
        names = [n for n in names if any(pathlib.PurePath(n).match(p) for p in patterns)]
    return sorted(n for n in set(names) if (pathlib.Path(root) / n).is_file())


def read(root, name):
    return (pathlib.Path(root) / name).read_text(encoding="utf-8", errors="replace").splitlines()


def closure(module):
    seen, todo = set(), list(MODULES[module])
    while todo:
        m = todo.pop()
        if m not in seen:
            seen.add(m)
            todo += MODULES[m]
    return seen


def module_of(name):
    parts = name.split("/")
    if parts[0] == "src" and len(parts) > 2:
        return parts[1]
    if parts[:2] == ["include", "capstan"] and len(parts) > 3:
        return parts[2]
    if parts[0] == "kernels":
        return "kernels"
    return None


def check_include(name, module, target, is_public):
    own_or_below = closure(module) | {module}
    parts = target.split("/")
    if parts[0] == "capstan" and len(parts) > 2 and parts[1] in MODULES and parts[1] not in own_or_below:
        return f"module {module} may not include {parts[1]} (may: {', '.join(sorted(own_or_below))})"
    if parts[0] in MODULES and len(parts) > 1 and parts[0] != module:
        return f"private header of {parts[0]} in {module}"
    torch = TORCH_INCLUDE.match(target)
    if torch and (module in TORCH_FREE or name in TORCH_FREE_FILES):
        return f"torch header {target} in a torch-free part"
    if torch and is_public and target not in NARROW:
        return f"public header includes {target}; only ATen/core/Tensor.h and narrower"
    if is_public and PRIVATE_ONLY.match(target):
        return f"{target} in a public header"
    if module == "kernels" and re.match(r"(cuda|nv)", target) and not name.startswith("kernels/cuda/"):
        return f"{target} outside kernels/cuda: the host compiler builds these files too"
    if target == "torch/torch.h":
        return "torch/torch.h costs 16 s a file: include what is used"
    return None


def includes(root):
    for name in tracked(root, "src/*.cpp", "src/*.h", "src/*.inc", "include/*.h", "kernels/*.cu", "kernels/*.cuh", "kernels/*.h", "kernels/*.cpp"):
        module = module_of(name)
        if module is None or module not in MODULES:
            continue
        for number, line in enumerate(read(root, name), 1):
            match = INCLUDE.match(line)
            problem = match and check_include(name, module, match.group(1), name.startswith("include/"))
            if problem:
                yield f"{name}:{number}: {problem}"


NOT_A_FUNCTION = ("namespace", "struct", "class", "enum", "union", "extern", "//", "if", "for", "while", "switch", "do", "else", "try")
LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)\'|//.*')


def functions(lines):
    """(first line, length) of every outermost body that follows a parameter list."""
    start, depth = None, 0
    for number, line in enumerate(lines, 1):
        code = LITERALS.sub("", line).rstrip()
        if start is None:
            if code.endswith("{") and ")" in code and not code.lstrip().startswith(NOT_A_FUNCTION):
                start, depth = number, 0
            else:
                continue
        depth += code.count("{") - code.count("}")
        if depth <= 0:
            yield start, number - start + 1
            start = None


def sizes(root):
    for name in tracked(root, "*.cpp", "*.h", "*.cc", "*.cu", "*.cuh"):
        if name in GENERATED:
            continue
        lines = read(root, name)
        limit = HEADER_LINES if name.startswith("include/") else SOURCE_LINES
        if len(lines) > limit:
            yield f"{name}:1: {len(lines)} lines, at most {limit}"
        for start, length in functions(lines):
            most = TEST_FUNCTION_LINES if name.startswith("tests/") else FUNCTION_LINES
            if length > most:
                yield f"{name}:{start}: a function of {length} lines, at most {most}"


def headers(root):
    patterns = ("*.cpp", "*.h", "*.inc", "*.cu", "*.cuh", "*.py", "*.sh", "*.cmake", "*.yaml", "*CMakeLists.txt", ".ci/run", ".clang-format", ".clang-tidy")
    for name in tracked(root, *patterns):
        top = "\n".join(read(root, name)[:4])
        if "SPDX-FileCopyrightText: Capstan contributors" not in top or "SPDX-License-Identifier: Apache-2.0" not in top:
            yield f"{name}:1: no licence header"


def words(root):
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|XXX)\b|not (yet )?imple" r"mented")
    for name in tracked(root, "*.cpp", "*.h", "*.inc", "*.cu", "*.cuh", "*.py", "*.sh", "*.cmake", "*.md", "*.yaml"):
        if name == "tests/lint/check_tree.py":
            continue
        for number, line in enumerate(read(root, name), 1):
            if unfinished.search(line):
                yield f"{name}:{number}: a word of unfinished work"
            if re.search(r"catch *\( *\.\.\. *\) *\{ *\}", line):
                yield f"{name}:{number}: a swallowed exception"
            if re.match(r"\s*#\s*if(def|ndef)?\b.*(CUDA|MPI|NCCL)", line) and name.startswith(("src/", "include/", "kernels/")):
                yield f"{name}:{number}: an optional part chosen by the preprocessor; use a no_<part>.cpp twin"


def main():
    checks = {"includes": includes, "sizes": sizes, "headers": headers, "words": words}
    if len(sys.argv) != 3 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    problems = list(checks[sys.argv[1]](sys.argv[2]))
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
