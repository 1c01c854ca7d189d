"""Reads rows of a Hugging Face dataset: finds its files, and selects the rows of a split.

Rule: no data file is left out silently, and `datasets` itself computes the rows of a slice.
"""

import re
from pathlib import Path

from mixtrain.data.compressed import COMPRESSED
from mixtrain.data.directory import is_not_data, is_pointer, saved_by_datasets, walk
from mixtrain.errors import UserError

BUILDER_OF_SUFFIX = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
EXAMPLES = "train[:10%], train[1000:2000] or train[:5%]+test"


def load_rows(
    name: str,
    split: str | None,
    column: str,
    subset: str | None = None,
    files: list[str] | None = None,
    not_excluded: set[str] | None = None,
) -> tuple[object, int | None]:
    """Return (one column of a split, its number of rows or None if unknown).

    `name` is a file, a pattern that matches `files`, a directory, or a dataset of the Hub.
    `not_excluded` are the names in a directory that --exclude keeps. Rows are streamed if
    `datasets` would otherwise copy them into its cache. `split` is a name or a spec of
    datasets.ReadInstruction; None is train. Raises UserError.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: to read it, install the package `datasets`") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are also raised
    try:
        splits, data_files = _open(datasets, name, subset, files, not_excluded)
        if split is None:
            is_saved_split = len(splits) == 1 and saved_by_datasets(Path(name))
            split = next(iter(splits)) if is_saved_split else "train"
        selection = _selection(datasets, name, split, splits, data_files)
        columns_of_split = {part: _columns(splits[part]) for part, _, _ in selection}
        for part, columns in columns_of_split.items():
            if column not in columns:
                shown = ", ".join(columns) or "no row"
                raise UserError(f"{name}: no column {column!r} in split {part!r}; there is {shown}")
        slices = [
            _slice(splits[part].select_columns([column]), begin, end)
            for part, begin, end in selection
        ]
        rows = slices[0] if len(slices) == 1 else datasets.concatenate_datasets(slices)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types, with no base class of its own
        missing = "" if files or Path(name).exists() else "no such path, and "
        why = f"{error_message(error)}{_advice(error)}"
        raise UserError(
            f"{name}: {missing}`datasets` cannot load the split {split or 'train'!r} of it: {why}"
        ) from error
    is_length_known = all(end is not None for _, _, end in selection)
    return rows, sum(end - begin for _, begin, end in selection) if is_length_known else None


def error_message(error: Exception) -> str:
    """Return the message of an error of `datasets`, without its code example."""
    return " ".join((str(error) or type(error).__name__).split("\nExample of usage")[0].split())


def _advice(error: Exception) -> str:
    if "zstd" not in str(error):
        return ""
    return (
        "; type --input-format jsonl if they are files of JSON lines, or unpack them with zstd -d"
    )


def _open(
    datasets, name: str, subset: str | None, files: list[str] | None, not_excluded: set[str] | None
) -> tuple[dict, dict]:
    """Return ({split: dataset}, {split: its files}); the second is empty for saved datasets."""
    path = Path(name)
    is_single = saved_by_datasets(path) or path.is_file() or bool(files)
    if subset and is_single:
        raise UserError(f"{name}: there are no subsets in it; leave --subset {subset} out")
    if saved_by_datasets(path):
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            return dict(loaded), {}
        is_named = loaded.split is not None and re.fullmatch(r"\w+", str(loaded.split))
        return {str(loaded.split) if is_named else "train": loaded}, {}
    if is_single:
        builder_name, options = _builder(name, files or [name])
        builder = datasets.load_dataset_builder(
            builder_name, data_files={"train": files or name}, **options
        )
    else:
        builder = datasets.load_dataset_builder(name, subset)
        if path.is_dir():
            _refuse_left_out(path, builder, not_excluded)
    data_files = {
        str(split): [str(file) for file in files_of_split]
        for split, files_of_split in (builder.config.data_files or {}).items()
    }
    for file in (file for files_of_split in data_files.values() for file in files_of_split):
        if is_pointer(Path(file)):
            raise UserError(
                f"{file}: a Git LFS pointer, its content was not fetched; type git lfs pull there"
            )
    return {str(split): rows for split, rows in builder.as_streaming_dataset().items()}, data_files


def _builder(name: str, files: list[str]) -> tuple[str, dict]:
    """Return (the name of the builder of `datasets` for the files, its options)."""
    file_of_builder = {_builder_name(Path(file.lower())): file for file in files}
    if None in file_of_builder:
        raise UserError(
            f"{file_of_builder[None]}: as a file of a data set it must end in"
            f" {' or '.join(BUILDER_OF_SUFFIX)}"
        )
    if len(file_of_builder) > 1:
        raise UserError(
            f"{name}: {' and '.join(file_of_builder.values())} are not of one format; give a"
            " narrower pattern"
        )
    builder = next(iter(file_of_builder))
    return ("csv", {"sep": "\t"}) if builder == "tsv" else (builder, {})


def _builder_name(path: Path) -> str | None:
    is_packed = path.suffix in COMPRESSED
    builder = BUILDER_OF_SUFFIX.get(Path(path.stem).suffix if is_packed else path.suffix)
    return None if is_packed and builder in ("parquet", "arrow") else builder


def _refuse_left_out(root: Path, builder, not_excluded: set[str] | None) -> None:
    """Raise UserError if `datasets` and --exclude disagree on which files are data.

    Every file below the root must belong to a subset of the dataset, be no data (README), or be
    excluded by the user; no file of the dataset may be excluded.
    """
    used_by_datasets = set()
    for config in [builder.config, *builder.builder_configs.values()]:
        data_files = config.data_files or {}
        if hasattr(data_files, "resolve"):  # patterns of a subset that was not chosen
            data_files = data_files.resolve(base_path=str(root.absolute()))
        for files_of_split in data_files.values():
            used_by_datasets |= {Path(file).resolve() for file in files_of_split}
    names = walk(root)
    used = [name for name in names if (root / name).resolve() in used_by_datasets]
    excluded = [name for name in used if not_excluded is not None and name not in not_excluded]
    if excluded:
        raise UserError(
            f"{root}: --exclude would leave out {excluded[0]}, which belongs to the data set; say"
            " which files to read with a pattern, as in"
            f" '{root}/**/*{Path(excluded[0]).suffix}'"
        )
    known = set(used)
    unused = [name for name in not_excluded or names if not (is_not_data(name) or name in known)]
    if unused:
        more = f" and {len(unused) - 1} more files" if len(unused) > 1 else ""
        example = min(used_by_datasets, default=root / "data" / "x.parquet")
        raise UserError(
            f"{root}: {unused[0]}{more} would be left out, `datasets` takes other files for the"
            " data; say so with --exclude, or which files to read with a pattern, as in"
            f" '{root}/**/*{example.suffix}'"
        )


def _selection(
    datasets, name: str, split: str, splits: dict, data_files: dict
) -> list[tuple[str, int, int | None]]:
    """Return (split, first row, end row or None for all) per term of, e.g., train[:10%]+test."""
    terms = [term.strip() for term in split.split("+")]
    unknown = [term for term in terms if re.split(r"[\[(]", term)[0] not in splits]
    if unknown:
        raise UserError(
            f"{name}: no split {unknown[0]!r}; there is {', '.join(splits)}, or a part of one:"
            f" {EXAMPLES}"
        )
    if all(term in splits for term in terms):
        return [(term, 0, None) for term in terms]
    lengths = {name_of_split: None for name_of_split in splits}
    for name_of_split in {re.split(r"[\[(]", term)[0] for term in terms}:
        lengths[name_of_split] = _length(splits[name_of_split], data_files.get(name_of_split, []))
    try:
        instructions = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{name}: --split {split} cannot be read ({error_message(error)}); as in {EXAMPLES}"
        ) from error
    for term, instruction in zip(terms, instructions, strict=True):
        if instruction.from_ >= instruction.to:
            raise UserError(
                f"{name}: --split {term} selects no row of the"
                f" {lengths[instruction.splitname]:,} in it"
            )
    return [(each.splitname, each.from_, each.to) for each in instructions]


def _length(rows, files: list[str]) -> int:
    """Return the number of rows: len(), from the footers of parquet files, or by reading all."""
    if hasattr(rows, "__len__"):
        return len(rows)
    if files and all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        from pyarrow.parquet import read_metadata

        return sum(read_metadata(file).num_rows for file in files)
    return sum(table.num_rows for table in rows.with_format("arrow").iter(batch_size=1000))


def _slice(rows, begin: int, end: int | None):
    if end is None:
        return rows
    if hasattr(rows, "__len__"):
        return rows.select(range(begin, end))
    return rows.skip(begin).take(end - begin)


def _columns(rows) -> list[str]:
    return rows.column_names or list(next(iter(rows), {}))
