"""Rows of a Hugging Face data set: the files they are in, and the part of them that a split takes.

The rule it keeps: no file beside the data is left out in silence, and a slice is cut where
`datasets` cuts it.
"""

import re
from pathlib import Path

from mixtrain.data.compressed import COMPRESSED
from mixtrain.data.directory import is_pointer, lies_beside, saved_by_datasets, walk
from mixtrain.errors import UserError

# fmt: off
BUILDER_OF_SUFFIX = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
    ".tsv": "tsv",
}
# fmt: on
EXAMPLES = "train[:10%], train[1000:2000] or train[:5%]+test"


def load_rows(
    name: str,
    split: str | None,
    column: str,
    subset: str | None = None,
    files: list[str] | None = None,
    names: set[str] | None = None,
) -> tuple[object, int | None]:
    """(one column of a split, its number of rows where it is known).

    Of a file, of the `files` that a pattern stands for, a directory (`names`: what is in it, but
    for what the user leaves out), or a name of the hub; streamed, where it would be copied into a
    cache first. `split` is a name or what datasets.ReadInstruction reads; None is train. Raises
    UserError.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: to read it, install the package `datasets`") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised as well
    try:
        parts, data_files = _open(datasets, name, subset, files, names)
        if split is None:
            split = (
                next(iter(parts)) if len(parts) == 1 and saved_by_datasets(Path(name)) else "train"
            )
        wanted = _wanted(datasets, name, split, parts, data_files)
        columns = {part: _columns(parts[part]) for part, _, _ in wanted}
        for part, there in columns.items():
            if column not in there:
                shown = ", ".join(there) or "no row"
                raise UserError(f"{name}: no column {column!r} in split {part!r}; there is {shown}")
        cuts = [
            _cut(parts[part].select_columns([column]), begin, end) for part, begin, end in wanted
        ]
        rows = cuts[0] if len(cuts) == 1 else datasets.concatenate_datasets(cuts)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types, with no base class of its own
        missing = "" if files or Path(name).exists() else "no such path, and "
        why = f"{reason(error)}{_way_out(error)}"
        raise UserError(
            f"{name}: {missing}`datasets` cannot load the split {split or 'train'!r} of it: {why}"
        ) from error
    known = all(end is not None for _, _, end in wanted)
    return rows, sum(end - begin for _, begin, end in wanted) if known else None


def reason(error: Exception) -> str:
    """What an error of `datasets` says, without its example of code."""
    return " ".join((str(error) or type(error).__name__).split("\nExample of usage")[0].split())


def _way_out(error: Exception) -> str:
    if "zstd" in str(error):
        return (
            "; type --input-format jsonl if they are files of JSON lines, or unpack them with"
            " zstd -d"
        )
    return ""


def _open(
    datasets, name: str, subset: str | None, files: list[str] | None, names: set[str] | None
) -> tuple[dict, dict]:
    """({split: data set}, {split: its files}); the second is empty where there is no need to know."""
    path = Path(name)
    single = saved_by_datasets(path) or path.is_file() or bool(files)
    if subset and single:
        raise UserError(f"{name}: there are no subsets in it; leave --subset {subset} out")
    if saved_by_datasets(path):
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            return dict(loaded), {}
        own = str(loaded.split)
        return {
            own if re.fullmatch(r"\w+", own) and loaded.split is not None else "train": loaded
        }, {}
    if single:
        kind, given = _builder(name, files or [name])
        builder = datasets.load_dataset_builder(kind, data_files={"train": files or name}, **given)
    else:
        builder = datasets.load_dataset_builder(name, subset)
        if path.is_dir():
            _refuse_left_out(path, builder, names)
    data_files = {
        str(part): [str(file) for file in found]
        for part, found in (builder.config.data_files or {}).items()
    }
    for file in (file for found in data_files.values() for file in found):
        if is_pointer(Path(file)):
            raise UserError(
                f"{file}: a Git LFS pointer, its content was not fetched; type git lfs pull there"
            )
    return {str(part): rows for part, rows in builder.as_streaming_dataset().items()}, data_files


def _builder(name: str, files: list[str]) -> tuple[str, dict]:
    """What `datasets` calls the format of the files, and what it has to be told of it."""
    builders = {_kind(Path(file.lower())): file for file in files}
    if None in builders:
        raise UserError(
            f"{builders[None]}: as a file of a data set it must end in"
            f" {' or '.join(BUILDER_OF_SUFFIX)}"
        )
    if len(builders) > 1:
        raise UserError(
            f"{name}: {' and '.join(builders.values())} are not of one format; give a narrower"
            " pattern"
        )
    kind = next(iter(builders))
    return ("csv", {"sep": "\t"}) if kind == "tsv" else (kind, {})


def _kind(path: Path) -> str | None:
    packed = path.suffix in COMPRESSED
    kind = BUILDER_OF_SUFFIX.get(Path(path.stem).suffix if packed else path.suffix)
    return None if packed and kind in ("parquet", "arrow") else kind


def _refuse_left_out(root: Path, builder, names: set[str] | None) -> None:
    """Every file below the root is one of the data set's, in some subset of it, or lies beside as a README does, or is
    none of the `names`, as the user has said."""
    used = set()
    for config in [builder.config, *builder.builder_configs.values()]:
        found = config.data_files or {}
        if hasattr(found, "resolve"):  # patterns of a subset that was not chosen
            found = found.resolve(base_path=str(root.absolute()))
        used |= {Path(file).resolve() for part in found.values() for file in part}
    there = walk(root)
    taken = [name for name in there if (root / name).resolve() in used]
    if names is not None and (out := [name for name in taken if name not in names]):
        raise UserError(
            f"{root}: --exclude would leave out {out[0]}, which belongs to the data set; say which"
            f" files to read with a pattern, as in '{root}/**/*{Path(out[0]).suffix}'"
        )
    left = [name for name in names or there if not lies_beside(name) and name not in set(taken)]
    if left:
        more = f" and {len(left) - 1} more files" if len(left) > 1 else ""
        one = min(used, default=root / "data" / "x.parquet")
        raise UserError(
            f"{root}: {left[0]}{more} would be left out, `datasets` takes other files for the"
            " data; say so with --exclude, or which files to read with a pattern, as in"
            f" '{root}/**/*{one.suffix}'"
        )


def _wanted(
    datasets, name: str, split: str, parts: dict, data_files: dict
) -> list[tuple[str, int, int | None]]:
    """(split, first row, row after the last one or None for all) for each term of a split such as train[:10%]+test."""
    terms = [term.strip() for term in split.split("+")]
    unknown = [term for term in terms if re.split(r"[\[(]", term)[0] not in parts]
    if unknown:
        raise UserError(
            f"{name}: no split {unknown[0]!r}; there is {', '.join(parts)}, or a part of one:"
            f" {EXAMPLES}"
        )
    if all(term in parts for term in terms):
        return [(term, 0, None) for term in terms]
    lengths = {part: None for part in parts}
    for part in {re.split(r"[\[(]", term)[0] for term in terms}:
        lengths[part] = _length(parts[part], data_files.get(part, []))
    try:
        found = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{name}: --split {split} cannot be read ({reason(error)}); as in {EXAMPLES}"
        ) from error
    for term, part in zip(terms, found, strict=True):
        if part.from_ >= part.to:
            raise UserError(
                f"{name}: --split {term} takes no row of the {lengths[part.splitname]:,} in it"
            )
    return [(part.splitname, part.from_, part.to) for part in found]


def _length(rows, files: list[str]) -> int:
    """The number of rows: known, in the footers of parquet files, or counted in a pass."""
    if hasattr(rows, "__len__"):
        return len(rows)
    if files and all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        from pyarrow.parquet import read_metadata

        return sum(read_metadata(file).num_rows for file in files)
    return sum(table.num_rows for table in rows.with_format("arrow").iter(batch_size=1000))


def _cut(rows, begin: int, end: int | None):
    if end is None:
        return rows
    return (
        rows.select(range(begin, end))
        if hasattr(rows, "__len__")
        else rows.skip(begin).take(end - begin)
    )


def _columns(rows) -> list[str]:
    return rows.column_names or list(next(iter(rows), {}))
