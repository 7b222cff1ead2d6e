"""The type of every configuration key. Defaults and comments live in conf/, values are checked here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BASE_URL = "^https?://[^@]+$"  # no user:password@, which would stand in logs and results


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


Words = Annotated[list[str], BeforeValidator(_as_list)]  # one word, a list, or null
Paths = Words


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rope(Strict):
    theta: Annotated[float, Field(gt=0)] | None


class Model(Strict):
    name: str
    path: str
    obtain: str | None
    tokenizer: str
    template: Literal["longalign-llama", "longalign-chatglm", "chatglm3", "chat_template", "text"]
    chat_template_kwargs: dict[str, Any]
    max_length: PositiveInt
    endpoint: Annotated[str, Field(pattern=BASE_URL)] | None
    dtype: Literal["auto", "float32", "bfloat16"]
    attention: Literal["auto", "flash4", "flash3", "flash2", "varlen", "sdpa"]
    kernels: Literal["auto", "none"]
    init: Literal["pretrained", "random"]
    rope: Rope
    config: dict[str, Any]


class DataNum(Strict):
    name: str
    n_long: Annotated[int, Field(ge=0)] | None


class Strategy(Strict):
    name: Literal["naive", "sorted", "packing", "packing+weighting", "balanced"]
    average: Literal["sequence", "pack", "token"]
    batch_size: PositiveInt
    group_size: PositiveInt
    packs_per_step: PositiveInt
    packer: Literal["best_fit", "next_fit", "spread", "equal_cost"]
    window: PositiveInt
    pack_tokens: PositiveInt | None
    strata: PositiveInt
    cost: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None


class Mix(Strict):
    weight: Annotated[float, Field(ge=0)] = 1.0
    max_samples: PositiveInt | None = None


class Slurm(Strict):
    partition: str | None
    account: str | None
    time: str | None
    warn_s: PositiveInt
    options: Words
    setup: Words


class Cluster(Strict):
    name: str
    device: Literal["auto", "cuda", "cpu"]
    processes: PositiveInt | Literal["auto"]
    nodes: PositiveInt | Literal["auto"]
    launcher: Literal["local", "hostfile", "slurm", "torchrun"]
    hostfile: str
    remote_shell: Annotated[str, Field(pattern=r"\{command\}")]
    master_addr: str | None
    port: Annotated[int, Field(ge=1, le=65535)] | None
    pass_env: Words
    slurm: Slurm
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: bool | Literal["auto"]  # auto until launch.resolve
    offload_param: bool
    packs_per_micro_step: PositiveInt
    sequence_parallel: PositiveInt
    deepspeed: dict[str, Any]
    env: dict[str, Annotated[str, BeforeValidator(str)]]

    @property
    def ranks(self) -> int:
        """Processes on all hosts; after launch.resolve, when both are numbers."""
        return int(self.processes) * int(self.nodes)


class Synthetic(Strict):
    name: Literal["synthetic"]
    long: Annotated[int, Field(ge=0)]
    short: Annotated[int, Field(ge=0)]
    test: Annotated[int, Field(ge=0)]
    text_tokens: Annotated[int, Field(ge=0)]
    min_tokens: Annotated[int, Field(ge=128)]
    max_tokens: Annotated[int, Field(ge=192)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"at least min_tokens={self.min_tokens}")
        return self


class Packages(Strict):
    name: Literal["packages"]
    path: Annotated[Paths, Field(min_length=1)]
    min_tokens: Annotated[int, Field(ge=128)]
    max_tokens: Annotated[int, Field(ge=192)]
    per_package: PositiveInt | None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"source.max_tokens of at least source.min_tokens={self.min_tokens}")
        return self


class Text(Strict):
    name: Literal["text"]
    documents: str
    tokens: PositiveInt | None


TaskKind = Literal[
    "fact", "facts", "values", "number", "numbers", "section", "first_last", "counting", "quoting", "multi_hop"
]


class LongTasks(Strict):
    name: Literal["long_tasks"]
    documents: str
    samples: PositiveInt
    turns: PositiveInt
    questions: Annotated[int, Field(ge=1, le=10)]  # of which the test split has enough owners
    kinds: Annotated[list[TaskKind], Field(min_length=1)]
    split: Literal["train", "test"]

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.kinds)) < len(self.kinds) or self.turns > len(self.kinds):
            raise ValueError(
                f"source.kinds without repeats, and source.turns of at most their number, {len(self.kinds)}"
            )
        return self


ShortKind = Literal[
    "rewrite", "summarise", "list", "explain", "arithmetic", "translate", "classify", "code",
    "compare", "extract", "write", "story", "sort", "advice", "facts",
]  # fmt: skip


class OwnAnswers(Strict):
    name: Literal["own_answers"]
    samples: PositiveInt
    kinds: Annotated[list[ShortKind], Field(min_length=1)]
    max_new_tokens: PositiveInt


class Price(Strict):
    input: Annotated[float, Field(ge=0)] | None
    output: Annotated[float, Field(ge=0)] | None


class Api(Strict):
    """How an OpenAI-compatible server is asked."""

    model: str
    api_key_env: str | None
    extra_body: dict[str, Any]
    timeout_s: Annotated[float, Field(gt=0)]
    retries: Annotated[int, Field(ge=0)]
    concurrency: PositiveInt


class SelfInstruct(Strict):
    name: Literal["self_instruct"]
    documents: str
    samples: PositiveInt
    min_tokens: PositiveInt
    max_tokens: PositiveInt
    length_weight: Annotated[float, Field(ge=0, le=10)]
    languages: Annotated[list[Literal["en", "zh"]], Field(min_length=1)]
    prompts: str | None
    base_url: Annotated[str, Field(pattern="^https?://")]
    model: str
    api_key_env: str | None
    temperature: Annotated[float, Field(ge=0)] | None
    max_output_tokens: PositiveInt | None
    extra_body: dict[str, Any]
    timeout_s: Annotated[float, Field(gt=0)]
    retries: Annotated[int, Field(ge=0)]
    concurrency: PositiveInt
    cache: str | None
    price_per_million: Price

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"source.max_tokens of at least source.min_tokens={self.min_tokens}")
        return self


class Records(Strict):
    """How a record tells its conversation, and the name of the file written; what all sources of records share."""

    format: Literal["openai", "alpaca", "sharegpt", "custom"]
    fields: dict[Literal["messages", "role", "content", "instruction", "input", "output", "system", "id"], str]
    roles: dict[str, Literal["system", "user", "assistant"]]
    output: Annotated[str, Field(pattern=r"^[^/\\]+$")] | None

    @field_validator("fields")
    @classmethod
    def _enough(cls, fields: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        turns, columns = ("messages", "role", "content"), ("instruction", "output")
        if info.data.get("format") == "custom" and not any(set(need) <= set(fields) for need in (turns, columns)):
            raise ValueError(f"a map with {', '.join(turns)} or with {', '.join(columns)}, since format=custom")
        return fields


class Hub(Records):
    name: Literal["longalign10k", "hub"]
    path: str
    subset: str | None
    split: str


class Files(Records):
    name: Literal["files"]
    path: Annotated[Paths, Field(min_length=1)]


class ShareGPT(Records):
    name: Literal["sharegpt"]
    path: Annotated[Paths, Field(min_length=1)]
    html: Literal["auto", "all", "none"]
    languages: Words
    max_tokens: PositiveInt | None


Conversations = Hub | Files | ShareGPT  # of others, see data/sources


class Endpoint(Api):
    base_url: Annotated[str, Field(pattern=BASE_URL)] | None


class Judge(Api):
    name: str
    base_url: Annotated[str, Field(pattern=BASE_URL)]
    temperature: Annotated[float, Field(ge=0)] | None
    max_output_tokens: PositiveInt | None
    repeats: Annotated[int, Field(ge=1, le=100)]
    attempts: Annotated[int, Field(ge=1, le=20)]
    cache: str | None
    price_per_million: Price


class Generation(Strict):
    context: PositiveInt | None
    batch_tokens: PositiveInt
    prefill_chunk_size: PositiveInt | None
    cache: Literal["dynamic", "offloaded"]


class Needle(Strict):
    lengths: Annotated[list[PositiveInt], Field(min_length=1)]
    depths: Annotated[list[Fraction], Field(min_length=1)]
    documents: PositiveInt
    needles: Annotated[int, Field(ge=1, le=50)]
    haystack: Paths
    distractors: Annotated[int, Field(ge=0, le=100)]  # there are some 270 test facts
    without_document: bool
    max_new_tokens: PositiveInt
    judge: bool


RetrievalKind = Literal["single_key", "multi_key", "multi_value", "multi_query", "variable_tracking", "aggregation"]


class Retrieval(Strict):
    lengths: Annotated[list[PositiveInt], Field(min_length=1)]
    kinds: Annotated[list[RetrievalKind], Field(min_length=1)]
    samples: PositiveInt
    keys: Annotated[int, Field(ge=1, le=50_000)] | None  # there are 51,612
    values: Annotated[int, Field(ge=1, le=100)]
    queries: Annotated[int, Field(ge=1, le=100)]
    chains: Annotated[int, Field(ge=1, le=100)]
    hops: Annotated[int, Field(ge=1, le=100)]
    words: Annotated[int, Field(ge=1, le=20)]
    haystack: Paths
    max_new_tokens: PositiveInt
    prompts: str | None


class HeldOut(Strict):
    path: str
    limit: PositiveInt | None


class LongBenchChat(Strict):
    cases: str
    few_shots: str | None
    languages: Annotated[list[Literal["en", "zh"]], Field(min_length=1)]
    limit: PositiveInt | None
    max_new_tokens: PositiveInt
    prompt: str | None


class LongBench(Strict):
    path: str
    datasets: Annotated[list[str], Field(min_length=1)]
    limit: PositiveInt | None
    max_new_tokens: dict[Literal["qa", "summary"], PositiveInt]
    prompts: str | None


class Tasks(Strict):
    heldout: HeldOut | None = None  # first: what it refuses is told before others have asked for hours
    needle: Needle | None = None
    longbench_chat: LongBenchChat | None = None
    longbench: LongBench | None = None
    retrieval: Retrieval | None = None


EvalTask = Literal["heldout", "needle", "retrieval", "longbench"]  # those that no judge is needed for


class Verify(Strict):
    packs: PositiveInt
    tokens: Annotated[int, Field(ge=64)] | Literal["auto"]


class Bench(Strict):
    packs: Annotated[list[str], Field(min_length=1)]
    attention: Annotated[list[Literal["auto", "flash4", "flash3", "flash2", "varlen", "sdpa"]], Field(min_length=1)]
    activations: Annotated[list[Literal["full", "selective", "budget", "offload", "none"]], Field(min_length=1)]
    targets: Fraction
    warm_up: Annotated[int, Field(ge=0)]
    repeat: PositiveInt
    step_packs: PositiveInt | None
    peer: Annotated[list[Literal["trl", "trl-defaults"]], BeforeValidator(_as_list)]
    strategies: Words
    steps: PositiveInt | None


class Forecast(Strict):
    gpu: Literal["auto", "H200", "H100", "A100-80GB", "B200"]
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None
    host_gib: Annotated[float, Field(gt=0)] | None
    probe: bool


class Wandb(Strict):
    project: str
    entity: str | None
    name: str | None
    group: str | None
    tags: Words


class Loggers(Strict):
    tensorboard: bool = False
    wandb: Wandb | None = None


class Watch(Strict):
    once: bool | Literal["auto"]
    every_s: Annotated[float, Field(ge=0.1)]


class Config(Strict):
    model: Model
    datanum: DataNum
    strategy: Strategy
    cluster: Cluster
    source: Annotated[
        Synthetic | Conversations | SelfInstruct | Packages | Text | LongTasks | OwnAnswers,
        Field(discriminator="name"),
    ]
    task: Tasks
    judge: Judge | None
    logger: Loggers

    seed: Annotated[int, Field(ge=0)]
    shuffle: bool
    long_file: Paths
    short_file: Paths
    data_dir: str
    max_length: PositiveInt
    truncate: Literal["right", "middle", "drop", "error"]
    template: Literal["auto", "longalign-llama", "longalign-chatglm", "chatglm3", "chat_template", "text"]
    num_proc: PositiveInt | None
    eval_fraction: Fraction
    mix: dict[str, Mix]

    epochs: PositiveInt
    max_steps: PositiveInt | None
    lr: Annotated[float, Field(gt=0)]
    lr_final: Annotated[float, Field(ge=0)]
    warmup_ratio: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[Fraction, Fraction]
    grad_clip: Annotated[float, Field(gt=0)] | None
    activations: Literal["auto", "full", "selective", "budget", "offload", "none"]
    slice_tokens: PositiveInt | None
    deterministic: bool
    save_every: PositiveInt | None
    eval_every: PositiveInt | None
    eval_tasks: Annotated[list[EvalTask], Field(min_length=1), BeforeValidator(_as_list)]
    keep_last: PositiveInt
    keep_every: PositiveInt | None
    max_bad_steps: PositiveInt
    hang_timeout_s: Annotated[float, Field(gt=0)] | None
    grace_s: Annotated[float, Field(gt=0)]
    resume: str
    init_from: str | None
    overwrite: bool
    preflight: bool
    objective: str

    prompt: str | None
    file: str | None
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Field(ge=0)]

    generation: Generation
    endpoint: Endpoint
    compare: Paths
    compare_paper: bool

    watch: Watch

    verify: Verify

    bench: Bench

    plan: Forecast

    reverse: bool

    output_dir: str | None

    @field_validator("keep_every")
    @classmethod
    def _is_saved(cls, keep_every: int | None, info: ValidationInfo) -> int | None:
        save_every = info.data.get("save_every")
        if keep_every and (not save_every or keep_every % save_every):
            raise ValueError(f"a multiple of save_every={save_every or 'null, which must then be a number'}")
        return keep_every
