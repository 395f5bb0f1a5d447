"""What `import sightline` adds to `import torch` (less than 0.3 s), each in a fresh process.

python benchmarks/startup.py [--rounds 9] [--save]
"""

import statistics
import subprocess
import sys

from measure import Report, arguments

CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import sightline
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    runs = []
    for _ in range(options.rounds + 1):
        output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
        runs.append([float(part) for part in output.split()])
    torch_seconds, ours = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    report = Report("Start-up")
    report.table("import torch, s", "import sightline adds, s (less than 0.3)")
    report.row(f"{torch_seconds:.2f}", f"{ours:.3f}")
    if options.save:
        report.write("startup")


if __name__ == "__main__":
    main()
