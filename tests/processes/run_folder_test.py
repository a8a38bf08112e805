#!/usr/bin/env python3
# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""The run directory from outside: fresh or not, branches left behind, exit.json, disk, event files, and who starts the ranks.

usage: CAPSTAN=path/to/bin/capstan run_folder_test.py [unittest arguments]
"""
import json
import os
import pathlib
import re
import shlex
import signal
import struct
import subprocess
import unittest

from cli_program import CAPSTAN, LONG, Program


class Directory(Program):
    def checkpoints(self, name):
        return sorted(p.name for p in (self.home / "runs" / name / "checkpoints").iterdir() if p.is_dir())

    def exit_report(self, name):
        return json.loads((self.home / "runs" / name / "exit.json").read_text())

    def test_resume_none_wants_an_empty_directory(self):
        run = self.home / "runs" / "used"
        for file in ("metrics.jsonl", "checkpoints/step-00000001.partial/x/a.safetensors", "logs/attempt_0/0/stdout.log"):
            (run / file).parent.mkdir(parents=True)
            (run / file).write_text("")
            for nproc in ("1", "2"):
                done = self.train("used", "--resume", "none", "--nproc", nproc, code=2)
                self.assertIn("--resume none", done.stderr)
                self.assertIn(file.split("/")[0], done.stderr)
            self.assertEqual([p for p in run.rglob("*") if p.is_file() and p.name != "lock"], [run / file], "nothing was written")
            subprocess.run(["rm", "-r", str(run)], check=True)
        for nproc in ("1", "2"):
            empty = self.home / "runs" / f"empty{nproc}" / "checkpoints"
            empty.mkdir(parents=True)
            self.train(f"empty{nproc}", "--resume", "none", "--nproc", nproc, "--set", "run.steps=2")
            self.train(f"empty{nproc}", "--resume", "none", "--nproc", nproc, "--set", "run.steps=4", code=2)

    def test_going_on_from_an_older_step_sets_the_newer_aside(self):
        self.train("branch", "--set", "run.steps=12")
        self.assertEqual(self.checkpoints("branch"), ["step-00000004", "step-00000008", "step-00000012"])
        left = self.weights("branch", 8)
        run = self.home / "runs" / "branch"
        done = self.train("branch", "--resume", str(run / "checkpoints" / "step-00000004"), "--set", "run.steps=8",
                          "--set", "optimizer.lr=5.0e-3", "--allow-change", "optimizer.lr")
        self.assertIn("moved to step-00000012.abandoned-1", done.stderr)
        self.assertEqual(self.checkpoints("branch"), ["step-00000004", "step-00000008", "step-00000008.abandoned-1", "step-00000012.abandoned-1"])
        self.assertEqual((run / "checkpoints" / "latest").read_text(), "step-00000008\n")
        self.assertNotEqual(self.weights("branch", 8), left, "the branch has its own step 8")
        self.assertEqual(self.run_capstan("checkpoint", "verify", "runs/branch/checkpoints/step-00000012.abandoned-1").returncode, 0)
        # Later saves and their retention leave them alone; `auto` goes on with the branch.
        self.train("branch", "--set", "run.steps=20", "--set", "optimizer.lr=5.0e-3")
        self.assertEqual(self.checkpoints("branch"), ["step-00000008.abandoned-1", "step-00000012", "step-00000012.abandoned-1", "step-00000016", "step-00000020"])
        self.assertEqual(self.exit_report("branch")["last_committed_step"], 20)

    def test_a_damaged_newest_step_is_set_aside_too(self):
        self.train("hurt")
        newest = self.home / "runs" / "hurt" / "checkpoints" / "step-00000008"
        shard = next(newest.glob("model-*.safetensors"))
        raw = bytearray(shard.read_bytes())
        raw[-5] ^= 1
        shard.write_bytes(raw)
        self.train("hurt", "--nproc", "2")
        self.assertEqual(self.checkpoints("hurt"), ["step-00000004", "step-00000008", "step-00000008.abandoned-1"])

    def test_the_printed_command_goes_on_after_an_older_step(self):
        self.train("cut", "--set", "run.steps=8")
        process = self.start("cut", *LONG, "--resume", "runs/cut/checkpoints/step-00000004")
        self.wait_for_step("cut", 11, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 90, err)
        step = self.exit_report("cut")["last_committed_step"]
        self.assertGreaterEqual(step, 11)
        command = shlex.split(re.search(r"To go on: capstan (.*)", err).group(1))
        self.assertNotIn("--resume", command, "the newest step is the one to go on from")
        self.check(*[f"run.steps={step + 2}" if word == "run.steps=100000" else word for word in command])
        self.assertEqual(sorted(self.steps("cut"))[-1], step + 2)

    def test_exit_json_of_each_way_to_end(self):
        self.train("ways", "--nproc", "2", "--set", "run.steps=4")
        done = self.exit_report("ways")
        self.assertEqual(sorted(done), ["class", "code", "error", "host", "last_committed_step", "message", "rank", "signal", "time", "worker_exit_code"])
        self.assertEqual((done["code"], done["class"], done["signal"], done["last_committed_step"]), (0, "done", None, 4))
        process = self.start("ways", *LONG, "--nproc", "2")
        self.wait_for_step("ways", 6, process)
        rank = self.ranks_of(process)[1]
        os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=60)
        killed = self.exit_report("ways")
        self.assertEqual((killed["code"], killed["class"], killed["rank"], killed["signal"]), (91, "worker", 1, "SIGKILL"))
        self.assertEqual((killed["worker_exit_code"], killed["last_committed_step"]), (None, 4))

    def test_a_hard_stop_is_reported(self):
        process = self.start("hard", *LONG, "--nproc", "2")
        self.wait_for_step("hard", 2, process)
        for rank in self.ranks_of(process).values():
            os.kill(rank, signal.SIGSTOP)  # they cannot save before the second signal
        process.send_signal(signal.SIGINT)
        line = b""
        while b"second one stops at once" not in line:
            line = process.stderr.buffer.raw.readline()
            self.assertTrue(line, "the launcher ended early")
        for rank in self.ranks_of(process).values():
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assertIn(process.returncode, (-signal.SIGINT, 90))
        report = self.exit_report("hard")
        if process.returncode == -signal.SIGINT:
            self.assertEqual((report["code"], report["class"], report["signal"]), (130, "stopped", "SIGINT"))

    def ranks_of(self, process):
        ranks = {}
        for pid in subprocess.run(["pgrep", "-P", str(process.pid), "-f", "capstan-run"], text=True, capture_output=True).stdout.split():
            environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks[next(int(e[5:]) for e in environment if e.startswith(b"RANK="))] = int(pid)
        return ranks

    def test_a_disk_too_small_is_refused_with_the_predicted_size(self):
        large = ("--set", "model.hidden_size=512", "--set", "model.intermediate_size=8192", "--set", "checkpoint.keep_last=1000000")
        for nproc in ("1", "2"):
            done = self.train("small", "--nproc", nproc, *large, code=2)
            self.assertRegex(done.stderr, r"got .* free, need .* \(1000001 checkpoints of [\d.]+ \w+\)")
            self.assertIn("checkpoint.keep_last", done.stderr)
            self.assertFalse((self.home / "runs" / "small" / "metrics.jsonl").exists(), "refused before training")
        predicted = json.loads(self.check("plan", "tiny.yaml", "--json").stdout)["checkpoint_bytes"]
        self.train("small", "--set", "run.steps=4")
        step = self.home / "runs" / "small" / "checkpoints" / "step-00000004"
        written = sum(f.stat().st_size for f in step.iterdir())
        self.assertLessEqual(written, predicted)
        self.assertLess(predicted, written + (5 << 20), "a few MiB are allowed for tokenizer and manifest")

    def test_a_small_disk_is_refused_on_a_small_disk(self):
        disk = self.home / "disk"
        disk.mkdir()
        script = ('mount -t tmpfs -o size=64k none disk && exec "$0" train tiny.yaml --set run.name=tmpfs --set run.directory=disk/run')
        done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-c", script, CAPSTAN], cwd=self.home, text=True, capture_output=True)
        if "unshare" in done.stderr or "mount" in done.stderr:
            self.skipTest("no private mounts here: " + done.stderr.strip())
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertRegex(done.stderr, r"got [\d.]+ KiB free, need")

    def test_event_files_hold_the_metrics(self):
        self.train("events", "--nproc", "2")
        files = list((self.home / "runs" / "events" / "tensorboard").iterdir())
        self.assertEqual(len(files), 1)
        self.assertRegex(files[0].name, r"^events\.out\.tfevents\.\d+\.")
        scalars = read_scalars(files[0].read_bytes(), self)
        steps = self.steps("events")
        self.assertEqual(sorted(steps), list(range(1, 9)))
        for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("train/lr", "lr")):
            self.assertEqual([s for s, _ in scalars[tag]], sorted(steps), tag)
            for step, value in scalars[tag]:
                self.assertEqual(value, struct.unpack("<f", struct.pack("<f", steps[step][key]))[0], f"{tag} at {step}")


def crc32c(data):
    """Castagnoli, bit by bit: an implementation of its own beside the one under test."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(data):
    """(number, value) of a protobuf message; bytes of fixed and length-delimited fields, integers of varints."""
    def varint(at):
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 0x80:
                return value, at
    at = 0
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(key & 7) or varint(at)
            value, at = data[at:at + size], at + size
        yield key >> 3, value


def read_scalars(raw, test):
    """TFRecord framing (length, masked crc32c, payload, masked crc32c) around Event messages: tag -> [(step, value)]."""
    test.assertEqual(crc32c(b"123456789"), 0xE3069283)
    scalars, at, first = {}, 0, True
    while at < len(raw):
        size = struct.unpack_from("<Q", raw, at)[0]
        test.assertEqual(struct.unpack_from("<I", raw, at + 8)[0], masked(raw[at:at + 8]))
        payload = raw[at + 12:at + 12 + size]
        test.assertEqual(len(payload), size)
        test.assertEqual(struct.unpack_from("<I", raw, at + 12 + size)[0], masked(payload))
        at += 16 + size
        event = dict(fields(payload))
        if first:
            test.assertEqual(event[3], b"brain.Event:2")
        first = False
        for number, value in fields(event.get(5, b"")):
            entry = dict(fields(value))
            if number == 1 and 2 in entry:
                scalars.setdefault(entry[1].decode(), []).append((event.get(2, 0), struct.unpack("<f", entry[2])[0]))
    return scalars


class Starting(Program):
    def test_a_dead_console_does_not_stop_the_save(self):
        for nproc in ("1", "2"):
            name = "deaf" + nproc
            process = self.start(name, *LONG, "--nproc", nproc)
            self.wait_for_step(name, 2, process)
            process.stderr.close()  # whoever read it is gone: every further write is EPIPE
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(timeout=60), 90)
            report = json.loads((self.home / "runs" / name / "exit.json").read_text())
            self.assertEqual((report["code"], report["class"], report["signal"]), (90, "preempted", "SIGINT"))
            self.check("checkpoint", "verify", "runs/" + name)
            self.assertGreaterEqual(report["last_committed_step"], 2)
            self.assert_no_rank_left(name)

    def test_more_ranks_than_processors_are_warned_of(self):
        one = {min(os.sched_getaffinity(0))}
        done = self.train("crowd", "--nproc", "2", "--set", "run.steps=2", preexec_fn=lambda: os.sched_setaffinity(0, one))
        self.assertRegex(done.stderr, r"warning: 2 ranks on this machine: only 1 processors are allowed here")
        done = self.train("alone", "--set", "run.steps=2", preexec_fn=lambda: os.sched_setaffinity(0, one))
        self.assertNotIn("processors are allowed", done.stderr)

    def start_ranks(self, name, environments):
        processes = [subprocess.Popen([CAPSTAN, "train", "tiny.yaml", "--set", f"run.name={name}"], cwd=self.home, text=True,
                                      env={**os.environ, **e}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for e in environments]
        return [(p.returncode, err) for p in processes for _, err in [p.communicate(timeout=120)]]

    def test_ranks_of_mpirun_and_srun_find_each_other(self):
        self.train("ours", "--nproc", "2")
        unique = str(os.getpid())
        mpi = [{"OMPI_COMM_WORLD_RANK": r, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": r, "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "PMIX_NAMESPACE": "mpi" + unique} for r in "01"]
        slurm = [{"SLURM_JOB_ID": unique, "SLURM_STEP_ID": "0", "SLURM_PROCID": r, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": r, "SLURM_NODEID": "0",
                  "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"} for r in "01"]
        for name, environments, words in (("mpi", mpi, "Open MPI"), ("slurm", slurm, "Slurm")):
            results = self.start_ranks(name, environments)
            self.assertEqual([code for code, _ in results], [0, 0], results)
            self.assertIn(f"2 ranks, 2 on this machine, as {words}", results[0][1])
            self.assertEqual(self.weights(name, 8), self.weights("ours", 8))
        both = self.start_ranks("both", [{**mpi[0], "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}])[0]
        self.assertNotEqual(both[0], 0)
        self.assertIn("RANK=1, WORLD_SIZE=2 and OMPI_COMM_WORLD_RANK=0", both[1])
        done = self.train("nested", "--nproc", "2", env={**os.environ, **mpi[0]}, code=2)
        self.assertIn("Open MPI", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)
