# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs the sample writer and reads its event file with the tensorboard package. Exit code 77: no such package."""
import subprocess
import sys
import tempfile

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    print("the tensorboard package is not installed")
    sys.exit(77)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.argv[1], folder], check=True)
        events = EventAccumulator(folder, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
        events.Reload()
        scalars = [(e.step, e.value) for e in events.Scalars("train/loss")]
        expected = [(1, 8.0), (2, 4.0), (3, 8.0 / 3)]
        assert len(scalars) == 3, scalars
        for got, want in zip(scalars, expected):
            assert got[0] == want[0] and abs(got[1] - want[1]) < 1e-6, (got, want)
        text = events.Tensors("run/start")[0]
        assert text.tensor_proto.string_val[0] == b"two words", text
        assert events.SummaryMetadata("run/start").plugin_data.plugin_name == "text"
        histogram = events.Histograms("grad")[0].histogram_value
        assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (-1.0, 4.0, 4.0, 4.0), histogram
        assert sum(histogram.bucket) == 4.0, histogram
        assert len(histogram.bucket) == len(histogram.bucket_limit)
    print("read by the tensorboard package: 3 scalars, 1 text, 1 histogram")


if __name__ == "__main__":
    main()
