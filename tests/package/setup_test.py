#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""tools/setup.sh with stand-ins for dpkg-query, id, sudo, apt-get, pip, cmake and df: what it asks for, and what it leaves alone."""
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
import zipfile

SOURCE = pathlib.Path(__file__).resolve().parents[2]
WHEELS = {"torch-2.11.0-cp311-none-manylinux_2_28_x86_64.whl": ["torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/include/ATen/ATen.h"],
          "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.whl": ["nvidia/cu13/lib/libcudart.so.13"],
          "nvidia_cuda_cupti-13.0.85-py3-none-manylinux2014_x86_64.whl": ["nvidia/cu13/lib/libcupti.so.13"]}
DEBIAN_12 = "VERSION_ID=\"12\"" in pathlib.Path("/etc/os-release").read_text() and "ID=debian" in pathlib.Path("/etc/os-release").read_text()


class Setup(unittest.TestCase):
    def setUp(self):
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="capstan setup "))
        self.checkout, self.bin, self.calls = self.home / "a checkout", self.home / "bin", self.home / "calls"
        (self.checkout / "tools").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.sh", "packages.txt"):
            shutil.copy(SOURCE / "tools" / name, self.checkout / "tools" / name)
        self.installed = (line.split(": ", 1)[1].split() for line in (SOURCE / "tools" / "packages.txt").read_text().splitlines() if ": " in line)
        self.installed = sorted(set(sum(self.installed, [])))
        self.stub("id", 'echo 1000')
        self.stub("sudo", 'exit 1')
        self.stub("apt-get", 'exit 0')
        self.stub("df", 'echo h; echo "none 9 9 99999999 9 /"')
        self.stub("sleep", 'exit 0')
        self.stub("python3", f'if [ "$2" = pip ]; then exit 1; fi; exec "{sys.executable}" "$@"')
        self.stub("cmake", 'case "$1" in --build) echo "ninja: no work to do." ;; *) while [ $# -gt 0 ]; do [ "$1" = -B ] && touch "$2/build.ninja"; shift; done ;; esac')
        self.have(self.installed)

    def tearDown(self):
        subprocess.run(["chmod", "-R", "u+w", str(self.home)], check=True)
        shutil.rmtree(self.home)

    def stub(self, name, body):
        file = self.bin / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.calls}"\n{body}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def have(self, packages):
        self.stub("dpkg-query", "\n".join(f"echo 'ii  {name}'" for name in packages))

    def called(self, name):
        text = self.calls.read_text() if self.calls.exists() else ""
        return [line for line in text.splitlines() if line.split()[0] == name and not (name == "python3" and " pip " not in line)]

    def wheels(self, leave_out=None):
        folder = self.home / "the wheels"
        folder.mkdir(exist_ok=True)
        for wheel, files in WHEELS.items():
            if wheel != leave_out:
                with zipfile.ZipFile(folder / wheel, "w") as archive:
                    for file in files:
                        archive.writestr(file, "x")
        return str(folder)

    def setup_sh(self, *arguments, code=0, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CAPSTAN_")}
        environment |= {"PATH": f"{self.bin}:{environment['PATH']}", **variables}
        done = subprocess.run([str(self.checkout / "tools" / "setup.sh"), *arguments], text=True, capture_output=True, env=environment, cwd=self.home)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done

    def errors(self, done):
        return [line for line in done.stderr.splitlines() if "error" in line]

    @unittest.skipUnless(DEBIAN_12, "packages are looked at on Debian 12 only")
    def test_without_rights_the_one_command_is_printed(self):
        self.have([p for p in self.installed if p not in ("ninja-build", "libfmt-dev")])
        done = self.setup_sh("--groups", "build", code=2)
        self.assertEqual(len(self.errors(done)), 1)
        self.assertIn("sudo apt-get update && sudo apt-get install -y --no-install-recommends libfmt-dev ninja-build", done.stderr)
        self.assertEqual(self.called("apt-get"), [])
        self.assertEqual(self.called("cmake"), [])

    @unittest.skipUnless(DEBIAN_12, "packages are looked at on Debian 12 only")
    def test_sudo_without_password_installs_what_is_missing(self):
        self.have([p for p in self.installed if p != "ninja-build"])
        self.stub("sudo", '[ "$2" = true ] && exit 0; exit 0')
        self.setup_sh("--groups", "build", "--no-build")
        self.assertEqual(self.called("sudo"), ["sudo -n true", "sudo -n apt-get update",
                                               "sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends ninja-build"])

    @unittest.skipUnless(DEBIAN_12, "packages are looked at on Debian 12 only")
    def test_a_held_lock_is_waited_for_and_another_failure_is_not(self):
        self.have([])
        self.stub("id", "echo 0")
        self.stub("apt-get", f'if [ $(grep -c "^apt-get update" "{self.calls}") -lt 3 ]; then echo "E: Could not get lock /var/lib/apt"; exit 100; fi')
        done = self.setup_sh("--no-build")
        self.assertIn("another package manager holds the lock", done.stderr)
        self.assertEqual(len([c for c in self.called("apt-get") if "update" in c]), 3)
        self.calls.unlink()
        self.stub("apt-get", 'echo "E: no such mirror"; exit 100')
        done = self.setup_sh("--no-build", code=1)
        self.assertIn("no such mirror", done.stderr)
        self.assertEqual(len(self.errors(done)), 1)
        self.assertEqual(len(self.called("apt-get")), 1)

    def test_nothing_missing_calls_no_package_manager(self):
        self.setup_sh("--no-build")
        self.assertEqual(self.called("apt-get") + self.called("sudo") + self.called("python3"), [])

    def test_wheels_are_unpacked_offline_and_once(self):
        folder = self.wheels()
        self.setup_sh("--wheels", folder)
        torch = self.checkout / ".deps" / "torch-2.11.0"
        for file in sum(WHEELS.values(), []):
            self.assertTrue((torch / file).is_file(), file)
        self.assertEqual(self.called("python3"), [], "no pip")
        self.assertTrue(any(f"-DCAPSTAN_TORCH_DIR={torch}/torch" in c for c in self.called("cmake")))
        self.assertFalse((self.checkout / ".deps" / "torch-2.11.0.partial").exists())
        marker = torch / "torch" / "mine"
        marker.write_text("")
        configured = len([c for c in self.called("cmake") if "--preset" in c])
        self.setup_sh()
        self.assertTrue(marker.exists(), "what is complete is not unpacked again")
        self.assertEqual(len([c for c in self.called("cmake") if "--preset" in c]), configured, "nor configured again")
        (torch / "nvidia/cu13/lib/libcupti.so.13").unlink()
        self.setup_sh("--wheels", folder)
        self.assertFalse(marker.exists(), "what has lost a part is made anew")

    def test_missing_wheels_and_failing_downloads_are_named(self):
        cupti = list(WHEELS)[2]
        done = self.setup_sh("--wheels", self.wheels(leave_out=cupti), code=2)
        self.assertIn("no nvidia_cuda_cupti-13.0.85*.whl", done.stderr)
        self.assertIn("pip download --no-deps", done.stderr)
        self.assertFalse((self.checkout / ".deps" / "torch-2.11.0").exists())
        done = self.setup_sh(code=1)
        self.assertIn("pip could not install torch==2.11.0", done.stderr)
        self.assertEqual(len(self.errors(done)), 1)
        done = self.setup_sh("--wheels", str(self.home / "nowhere"), code=2)
        self.assertIn("no such folder", done.stderr)

    def test_the_cuda_preset_takes_its_libraries_from_the_wheels(self):
        self.stub("nvcc", "exit 0")
        folder = self.wheels()
        done = self.setup_sh("--preset", "cuda", "--wheels", folder, code=2)
        self.assertIn(f"not all in {folder}; download them with: python3 -m pip download -d DIR cuda-toolkit[", done.stderr)
        self.stub("python3", 'if [ "$2" = pip ]; then while [ "$1" != --target ]; do shift; done; mkdir -p "$2/nvidia/nccl/lib"; '
                             f'touch "$2/nvidia/nccl/lib/libnccl.so.2"; exit 0; fi; exec "{sys.executable}" "$@"')
        self.setup_sh("--preset", "cuda", "--wheels", folder)
        self.assertTrue((self.checkout / ".deps/torch-2.11.0/nvidia/nccl/lib/libnccl.so.2").exists())
        asked = self.called("python3")
        self.assertTrue(all(f"--no-index --find-links {folder}" in call for call in asked), asked)
        self.setup_sh("--preset", "cuda", "--wheels", folder)
        self.assertEqual(self.called("python3"), asked, "what is there is not unpacked again")

    def test_a_full_disk_is_found_before_anything_is_written(self):
        self.stub("df", 'echo h; echo "none 9 9 1048576 9 /"')
        done = self.setup_sh("--wheels", self.wheels(), code=2)
        self.assertIn("1024 MiB are free", done.stderr)
        self.assertFalse((self.checkout / ".deps" / "torch-2.11.0.partial").exists())

    def test_a_read_only_checkout_works_with_folders_elsewhere(self):
        before = sorted(p.relative_to(self.checkout) for p in self.checkout.rglob("*"))
        subprocess.run(["chmod", "-R", "a-w", str(self.checkout)], check=True)
        out = self.home / "elsewhere"
        folders = {"CAPSTAN_DEPS_DIR": str(out / "deps"), "CAPSTAN_CACHE_DIR": str(out / "cache"), "CAPSTAN_BUILD_DIR": str(out / "build")}
        self.setup_sh("--wheels", self.wheels(), **folders)
        self.assertEqual(sorted(p.relative_to(self.checkout) for p in self.checkout.rglob("*")), before)
        self.assertTrue((out / "deps" / "torch-2.11.0" / "torch" / "lib" / "libtorch_cpu.so").exists())
        self.assertTrue((out / "build" / "build.ninja").exists())
        if os.geteuid() != 0:  # root may write everywhere
            done = self.setup_sh("--wheels", self.wheels(), code=2)
            self.assertIn("cannot write to", done.stderr)

    def test_wrong_arguments(self):
        for arguments, words in ((("--frobnicate",), "unknown argument"), (("--wheels",), "needs a value"), (("--torch", "/nonexistent"), "no lib/libtorch_cpu.so")):
            self.assertIn(words, self.setup_sh(*arguments, code=2).stderr)
        self.assertIn("CAPSTAN_JOBS", self.setup_sh("--wheels", self.wheels(), code=2, CAPSTAN_JOBS="many").stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)
