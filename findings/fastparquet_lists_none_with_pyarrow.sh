#!/usr/bin/env bash
# Versions: fastparquet 2026.9.0, pandas 3.1.1, polars 2.1.0, pyarrow 26.0.1, Python 3.11.
#
# A data set with a column of lists of strings (the sentences of a document) lies in two Parquet
# files: a small one written by polars, a larger one (60,000 distinct strings) written by pyarrow,
# both with the writer's defaults. fastparquet supports one level of lists and reads both.
#
# Expected: the rows that were written; at worst an error. What else is installed does not matter,
#   since fastparquet decodes Parquet without pyarrow.
# Seen: the first file is read right until pyarrow is installed beside it; then every row of the
#   column is None, without a warning. Of pyarrow's own file the first 5472 of 20000 rows are right
#   and the others None: rows in pages without a dictionary are lost, and the writer stops using
#   its dictionary when that reaches 1 MiB, so files of test size show nothing. With pyarrow
#   importable, plain pages of strings are gathered as arrow arrays for a flat column, and for a
#   list nobody puts them back into rows. A column of lists of integers in the same file is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --disable-pip-version-check)
"${pip[@]}" fastparquet==2026.9.0 pandas==3.1.1 polars==2.1.0

cat > "$work/check.py" <<'PY'
import hashlib
import importlib.util
import sys

import fastparquet
import polars

folder, wanted_right = sys.argv[1], [int(n) for n in sys.argv[2:]]
ROWS = 20_000


def documents(rows):
    names = [[f"{row} {i}".encode() for i in range(3)] for row in range(rows)]
    return {
        "ids": [[row, row + 1] for row in range(rows)],
        "text": [[hashlib.sha256(name).hexdigest() for name in row] for row in names],
    }


def right_rows(path, written):
    """Reads with fastparquet; returns how many rows are right, per column, and how many None."""
    frame = fastparquet.ParquetFile(path).to_pandas()
    read = {k: [None if v is None else list(v) for v in frame[k]] for k in written}
    right = {k: sum(a == b for a, b in zip(read[k], written[k], strict=True)) for k in written}
    return right, sum(v is None for v in read["text"])


have_pyarrow = importlib.util.find_spec("pyarrow") is not None
print("pyarrow installed:", have_pyarrow)
small, large = documents(100), documents(ROWS)
files = {f"{folder}/polars.parquet": small}
if have_pyarrow:
    import pyarrow
    import pyarrow.parquet

    path = f"{folder}/pyarrow.parquet"
    pyarrow.parquet.write_table(pyarrow.table(large), path)
    files[path] = large
else:
    polars.DataFrame(small).write_parquet(f"{folder}/polars.parquet")

for (path, written), wanted in zip(files.items(), wanted_right, strict=True):
    right, none = right_rows(path, written)
    rows = len(written["text"])
    print(f"  {path.rsplit('/')[-1]}: {rows} rows, right {right}, text None {none}")
    assert polars.read_parquet(path).to_dict(as_series=False) == written
    assert right == {"ids": rows, "text": wanted} and none == rows - wanted
PY
"$work/venv/bin/python" "$work/check.py" "$work" 100
"${pip[@]}" pyarrow==26.0.1
"$work/venv/bin/python" "$work/check.py" "$work" 0 5472
