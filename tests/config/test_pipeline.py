"""Layers of a stage: Megatron-Core's numbers, and refused where Megatron-Core refuses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from composing import config_of
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from mixtrain.config import pipeline_split
from mixtrain.config.plan import resolve
from mixtrain.config.schema import ParallelConfig

FIRST, LAST = pipeline_split.SIZES
EMBEDDING, LOSS = pipeline_split.FLAGS
PLACES = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L", LayerType.mtp: "m"}


def parallel_of(
    pp: int, vpp: int | None = None, layout: str | None = None, **keys: object
) -> ParallelConfig:
    """The keys of a pipeline; `pipeline` reads no others."""
    uneven = dict.fromkeys(pipeline_split.SIZES) | dict.fromkeys(pipeline_split.FLAGS, False) | keys
    return ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_model_parallel_layout=layout,
        **uneven,
    )


def megatrons_stages(parallel: ParallelConfig, num_layers: int) -> pipeline_split.Stages | None:
    """Layers of each chunk of each stage as Megatron-Core builds them; None where it refuses the
    configuration.
    """
    pp = parallel.pipeline_model_parallel_size
    layout = parallel.pipeline_model_parallel_layout
    keys = {key: getattr(parallel, key) for key in (*pipeline_split.SIZES, *pipeline_split.FLAGS)}
    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            pipeline_model_parallel_layout=layout,
            pipeline_dtype=torch.float32,
            **keys,
        )
        chunks = config.virtual_pipeline_model_parallel_size
        numbers = range(chunks) if chunks else [None]
        if layout is None:
            return tuple(
                tuple(get_num_layers_to_build(config, chunk, stage) for chunk in numbers)
                for stage in range(pp)
            )
        parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks)
        count = config.pipeline_model_parallel_layout.get_num_layers_to_build
        return tuple(
            tuple(count(LayerType.decoder, chunk, stage) for chunk in numbers)
            for stage in range(pp)
        )
    except (AssertionError, ValueError):
        return None
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)


def pipelines() -> Iterator[ParallelConfig]:
    """Pipelines of two to four stages, with and without chunks, with each kind of uneven split and
    with two at once.
    """
    sizes = [None, 1, 2, 4]
    for pp, vpp, first, last in product((2, 3, 4), (None, 2, 3), sizes, sizes):
        yield parallel_of(pp, vpp, **{FIRST: first, LAST: last})
    for pp, vpp, embedding, loss in product((2, 3, 4), (None, 2, 3), (False, True), (False, True)):
        yield parallel_of(pp, vpp, **{EMBEDDING: embedding, LOSS: loss})
        yield parallel_of(pp, vpp, **{FIRST: 2, EMBEDDING: embedding, LOSS: loss})


GRID = list(pipelines())


def test_a_pipeline_is_refused_exactly_where_megatron_refuses_it_and_has_megatrons_layers():
    accepted = refused = 0
    for parallel, num_layers in product(GRID, range(1, 19)):
        theirs = megatrons_stages(parallel, num_layers)
        problems = pipeline_split.problems(parallel, num_layers)
        impossible = theirs is None or min(map(min, theirs)) < 0
        assert bool(problems) == impossible, (parallel, num_layers, theirs, problems)
        if impossible:
            refused += 1
        else:
            accepted += 1
            assert pipeline_split.stages(parallel, num_layers) == theirs, (parallel, num_layers)
            assert sum(map(sum, theirs)) == num_layers
    assert min(accepted, refused) > 300


@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_without_a_pipeline_one_stage_has_every_layer(num_layers):
    assert pipeline_split.problems(parallel_of(1), num_layers) == []
    assert (
        pipeline_split.stages(parallel_of(1), num_layers)
        == megatrons_stages(parallel_of(1), num_layers)
        == ((num_layers,),)
    )


@pytest.mark.parametrize("keys", [{FIRST: 2}, {LAST: 2}, {EMBEDDING: True}, {LOSS: True}], ids=str)
def test_an_uneven_split_of_one_stage_is_refused_though_megatron_takes_it(keys):
    parallel = parallel_of(1, **keys)
    assert megatrons_stages(parallel, 2) is not None
    assert (
        "needs parallel.pipeline_model_parallel_size of 2 or more"
        in pipeline_split.problems(parallel, 2)[0]
    )


def test_a_stage_of_less_than_no_layers_is_refused_though_megatron_counts_with_it():
    parallel = parallel_of(2, **{FIRST: 8})
    assert megatrons_stages(parallel, 4) == ((8,), (-4,))
    assert [text for text in pipeline_split.problems(parallel, 4) if text.endswith("; use 9")]


# pipeline keys, layers, and what the problem says
REFUSED = {
    "layers do not divide": (
        parallel_of(2),
        3,
        "num_layers = 3 must be a multiple of PP*VPP = 2*1; use 2 or 4",
    ),
    "fewer layers than stages": (
        parallel_of(4),
        3,
        "num_layers = 3 must be a multiple of PP*VPP = 4*1; use 4",
    ),
    "chunks do not divide": (parallel_of(2, 2), 6, "multiple of PP*VPP = 2*2; use 4 or 8"),
    "the first stage takes all": (
        parallel_of(2, **{FIRST: 2}),
        2,
        "(0 where the first and last stage leave 1 stages)",
    ),
    "nothing is left between": (
        parallel_of(3, **{FIRST: 1, LAST: 1}),
        2,
        "(0 where the first and last stage leave 1",
    ),
    "the last stage's rest": (parallel_of(3, **{LAST: 1}), 4, "use 3 or 5"),
    "both ends, too many layers": (parallel_of(2, **{FIRST: 1, LAST: 2}), 4, "use 3"),
    "first stage over chunks": (
        parallel_of(3, 2, **{FIRST: 3}),
        7,
        f"{FIRST} = 3 must be a multiple of VPP = 2",
    ),
    "embedding as a layer": (parallel_of(2, **{EMBEDDING: True}), 4, "use 3 or 5"),
    "two kinds at once": (
        parallel_of(2, **{FIRST: 1, EMBEDDING: True}),
        3,
        "cannot be set together",
    ),
    "layout with too few layers": (
        parallel_of(2, layout="Et|tL"),
        3,
        "has 2 layers, model.num_layers = 3",
    ),
    "layout without E": (parallel_of(2, layout="tt|tL"), 3, "must begin with its only E"),
    "layout with E inside": (parallel_of(2, layout="tE|tL"), 2, "must begin with its only E"),
    "layout with two L": (parallel_of(2, layout="EtL|tL"), 2, "end with its only L"),
    "layout without L": (parallel_of(2, layout="Et|t"), 2, "end with its only L"),
    "layout with another letter": (parallel_of(2, layout="Et|xtL"), 2, 'has "x"'),
    "layout of three for two": (
        parallel_of(2, layout="Et|t|L"),
        2,
        "has 3 segments, which must be a multiple of PP",
    ),
    "layout and chunks": (parallel_of(2, 3, layout="Et|t|t|L"), 3, "= 3, but the layout has 2"),
    "layout and a size": (
        parallel_of(2, layout="Et|tL", **{FIRST: 1}),
        2,
        f"{FIRST} cannot be set together",
    ),
    "layout and a flag": (
        parallel_of(2, layout="Et|tL", **{LOSS: True}),
        2,
        f"{LOSS} cannot be set together",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_refuses_is_refused_with_its_numbers(name):
    parallel, num_layers, message = REFUSED[name]
    assert megatrons_stages(parallel, num_layers) is None
    assert [text for text in pipeline_split.problems(parallel, num_layers) if message in text], (
        pipeline_split.problems(parallel, num_layers)
    )


# pipeline keys, layers, and how the first problem ends
ENDS = {
    "in their order": (parallel_of(4), 14, "; use 12 or 16"),
    "a single layer": (parallel_of(2, **{EMBEDDING: True}), 2, "; use 1 or 3"),
    "never none": (parallel_of(2, **{EMBEDDING: True, LOSS: True}), 1, "; use 2"),
    "the next alone": (parallel_of(2, **{FIRST: 2}), 2, "; use 3"),
    "a chunk": (parallel_of(2, 2, layout="Et|tL"), 2, " = 2, but the layout has 1; use null"),
    "L inside": (
        parallel_of(2, layout="Et|Lt"),
        2,
        " = Et|Lt must begin with its only E and end with its only L",
    ),
    "the first letter": (
        parallel_of(2, layout="Etzyxwvus|L"),
        1,
        ' has "s"; E is the embedding, t a layer, L the loss, | the next stage',
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_refusal_ends_with_what_is_legal(name):
    parallel, num_layers, message = ENDS[name]
    assert pipeline_split.problems(parallel, num_layers)[0].endswith(message)


# pipeline keys, layers, and all that is said: no second problem that is arithmetic with what the
# first refuses
ALONE = {
    "no stage between": (
        parallel_of(2, **{FIRST: 1, LAST: 1}),
        4,
        "model.num_layers = 4, but the first and the last stage, all of PP = 2, hold 1+1 = 2; use"
        " 2",
    ),
    "no pipeline": (
        parallel_of(1, **{FIRST: 1, LAST: 1}),
        4,
        f"parallel.{FIRST} needs parallel.pipeline_model_parallel_size of 2 or more, not 1",
    ),
    "two kinds at once": (
        parallel_of(2, **{FIRST: 1, LOSS: True}),
        4,
        f"parallel.{FIRST} and parallel.{LOSS} cannot be set together; use one kind of uneven"
        " split",
    ),
    "a first stage not of chunks": (
        parallel_of(2, 2, **{FIRST: 3}),
        4,
        f"parallel.{FIRST} = 3 must be a multiple of VPP = 2; use 2 or 4",
    ),
    "a first stage of less than chunks": (
        parallel_of(2, 3, **{FIRST: 1}),
        4,
        f"parallel.{FIRST} = 1 must be a multiple of VPP = 3; use 3",
    ),
    "a chunk of less than nothing": (
        parallel_of(2, 2, **{EMBEDDING: True}),
        1,
        "model.num_layers = 1 (2 where the first and last stage leave 2 stages) must be a multiple"
        " of PP*VPP = 2*2; use 3",
    ),
    "segments that are no stages": (
        parallel_of(2, 3, layout="Et|t|L"),
        2,
        "parallel.pipeline_model_parallel_layout has 3 segments, which must be a multiple of PP ="
        " 2",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_refused_has_no_second_problem_that_follows_from_it(name):
    parallel, num_layers, message = ALONE[name]
    assert pipeline_split.problems(parallel, num_layers) == [message]


def test_a_layout_of_fewer_segments_than_stages_leaves_stages_without_layers():
    """It is refused; its numbers are made all the same."""
    assert pipeline_split.stages(parallel_of(4, layout="Et|tL"), 2) == ((1,), (1,), (0,), (0,))


def test_the_numbers_that_a_refusal_offers_are_legal():
    offers = 0
    for parallel, num_layers in product(GRID, range(1, 13)):
        problems = pipeline_split.problems(parallel, num_layers)
        if (
            len(problems) == 1
            and "; use " in problems[0]
            and problems[0].startswith("model.num_layers")
        ):
            numbers = [int(number) for number in problems[0].split("; use ")[1].split(" or ")]
            offers += len(numbers)
            assert numbers and all(
                pipeline_split.problems(parallel, number) == [] for number in numbers
            ), problems
    assert offers > 300


LAYOUTS = {  # layout: (stages, what each chunk of each stage has)
    "Et|tL": (2, ((1,), (1,))),
    "Et*3|tL": (2, ((3,), (1,))),
    "E|t|t|L": (4, ((0,), (1,), (1,), (0,))),
    "E|t|t|L ": (4, None),
    "Et|t|t|L": (2, ((1, 1), (1, 0))),
    "Ett|(t|)*2L": (4, ((2,), (1,), (1,), (0,))),
    "Ett|(t|)*2t*3L": (2, ((2, 1), (1, 3))),
    "Ettt|(tt|)*29,t|L": (32, ((3,), *(((2,),) * 29), (1,), (0,))),
    "E,t*2|t,L": (2, ((2,), (1,))),
    "Et||t|tL": (2, ((1, 1), (0, 1))),
    "EtttL": (1, ((3,),)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_megatrons_layers(layout):
    pp, expected = LAYOUTS[layout]
    parallel = parallel_of(pp, layout=layout)
    num_layers = pipeline_split.fewest_layers(parallel)
    assert megatrons_stages(parallel, num_layers) == expected
    if expected is None:
        assert pipeline_split.problems(parallel, num_layers)
    else:
        assert pipeline_split.problems(parallel, num_layers) == []
        assert pipeline_split.stages(parallel, num_layers) == expected
        assert pipeline_split.chunks_of_layout(parallel) == (
            len(expected[0]) if len(expected[0]) > 1 else None
        )


def test_random_layouts_are_refused_exactly_where_megatron_refuses_them():
    accepted = 0
    generator = torch.Generator().manual_seed(7)
    letters = ["E", "t", "t", "t*2", "|", "|", "(t|)*2", "(tt|)*2", ",", "L"]
    for _ in range(3000):
        inner = [letters[i] for i in torch.randint(len(letters), (4,), generator=generator)]
        layout = "".join(["Et", *inner, "L"])
        pp = int(torch.randint(1, 4, (), generator=generator))
        parallel = parallel_of(pp, layout=layout)
        num_layers = pipeline_split.fewest_layers(parallel)
        theirs = megatrons_stages(parallel, num_layers)
        assert bool(pipeline_split.problems(parallel, num_layers)) == (theirs is None), layout
        if theirs is not None:
            accepted += 1
            assert pipeline_split.stages(parallel, num_layers) == theirs, layout
    assert accepted > 200


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, "(Et|tL)*1", "E(t|t)*3L", "Et*0|tL", "E|(t|)*12L", "Et*10|(t*2|)*3L"]
)
def test_segments_unroll_as_megatron_unrolls_them(layout):
    try:
        theirs = [
            "".join(PLACES[kind] for kind in stage)
            for stage in PipelineParallelLayerLayout.parse_str_to_list(layout)
        ]
    except AssertionError:
        assert pipeline_split.problems(parallel_of(2, layout=layout), 2)
    else:
        assert pipeline_split.segments(layout) == theirs


def test_the_fewest_layers_are_the_fewest_that_leave_no_chunk_empty():
    found = 0
    for parallel in GRID:
        filled = (
            number
            for number in range(1, 40)
            if pipeline_split.problems(parallel, number) == []
            and min(map(min, pipeline_split.stages(parallel, number))) > 0
        )
        # none: the sizes of the first and last stage are wrong whatever the rest has
        fewest = next(filled, None)
        if fewest is not None:
            found += 1
            assert pipeline_split.fewest_layers(parallel) == fewest, parallel
    assert found > 60
    assert pipeline_split.fewest_layers(parallel_of(1)) == 2


def test_a_configuration_that_leaves_the_layers_open_is_given_the_fewest():
    uneven = [
        "parallel.pipeline_model_parallel_size=4",
        f"parallel.{FIRST}=2",
        f"parallel.{LAST}=1",
    ]
    config = resolve(config_of("parallel=ep1", "model.num_layers=null", *uneven))
    assert config.model.num_layers == 5
    layout = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.pipeline_model_parallel_layout='Et*3|t|t|L'",
    ]
    config = resolve(config_of("parallel=ep1", "model.num_layers=null", *layout))
    assert (config.model.num_layers, config.parallel.virtual_pipeline_model_parallel_size) == (5, 2)
