"""The typed configuration of a run: what a YAML file may say, and nothing else.

Every key changes behaviour; an unknown key, a bad value or a contradiction is a `ConfigError` that names the key
(`agl_ray.config.load`). Field docstrings say effect and interaction. Derived quantities are properties.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from agl_ray.config.agent import AgentKey
from agl_ray.config.algorithm import AlgorithmConfig, check_reachable
from agl_ray.config.credit import CreditConfig, check_sides
from agl_ray.config.critic import CriticConfig, check_baseline
from agl_ray.config.judge import JudgeConfig
from agl_ray.config.logging import LoggingConfig
from agl_ray.config.lora import LearnerLoraConfig
from agl_ray.config.roles import RoleConfig, RoleName
from agl_ray.config.rollout import RolloutSection, ValidationConfig
from agl_ray.config.runners import RunnersConfig
from agl_ray.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section
from agl_ray.config.store_address import without_keys
from agl_ray.config.teacher import check_temperature
from agl_ray.config.tracing import TracingConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.config.verl import check_verl


class ModelConfig(Section):
    path: str | None = None
    """Folder of a Hugging Face causal LM with its tokenizer. None: `make` builds it."""
    make: str | None = None
    """`file.py:function` or `module:function`, called as `function(folder: Path, seed: int, progress)` to make the model folder
    when `path` is None; its result is cached by seed and by the content of the file."""
    make_seconds: PositiveFloat = 3600.0
    """Deadline for `make`."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.make is None):
            raise ValueError(
                "give exactly one of model.path (a model folder) and model.make (a function that makes one)"
            )
        return self


class DataConfig(Section):
    train: str | None = None
    """A .jsonl or .parquet file, or `file.py:function` called with `seed=` and returning a list of rows (dictionaries). None only where rows are passed to `Trainer.fit`."""
    val: str | None = None
    """As `train`: the held-out rows used for validation."""
    fields: list[str] = []
    """Names that every row must have; checked before anything starts."""
    shuffle: bool = True
    """Shuffle the training rows by seed, anew each epoch. False: file order."""


class EngineConfig(Section):
    replicas: Positive = 1
    """vLLM engines behind Ray Serve."""
    max_model_len: Positive = 256
    """Longest prompt + response in tokens."""
    max_num_seqs: Positive = 256
    """Most sequences that one engine decodes at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the engine's weights; float32 makes engine and learner agree to 1e-5."""
    tool_parser: str | None = None
    """Name of vLLM's tool-call parser for this model (`hermes` for Qwen); None: `tools` in a request are refused."""
    reasoning_parser: str | None = None
    """Name of vLLM's reasoning parser for this model (`deepseek_r1` for any model that writes `<think>...</think>`, `qwen3`, ...):
    the gateway gives an answer's thoughts in a field of their own, in every dialect. None: they stay part of the text."""
    kv_cache_gib: PositiveFloat = 0.25
    """KV cache of one engine on CPU, GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of GPU memory that vLLM takes; refused on CPU unless left alone."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    """CPUs that Ray reserves for one engine."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per engine; 0 = CPU."""
    start_seconds: PositiveFloat = 300.0
    """Deadline for an engine to come up and take its first weights."""


class GatewayConfig(Section):
    host: str = "127.0.0.1"
    """Address that the HTTP door listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the HTTP door; 0 = a free one."""
    call_timeout_seconds: PositiveFloat = 60.0
    """Deadline of one model call, holds during weight updates included; past it the call fails as `engine_error`."""
    overlong: Literal["error", "drop-oldest-turns", "truncate-middle"] = "error"
    """A prompt that leaves no room for an answer: error refuses it; the others take whole old turns, or tokens of the middle, out of it
    (system message and first user message stay), record that on the call's span and go on in a branch of the session."""
    max_calls: Positive | None = None
    """Most model calls of one attempt, all roles; beyond it calls are refused with status 429 and counted. None = no limit."""
    max_tokens_per_rollout: Positive | None = None
    """Most response tokens of one attempt's calls together; a call gets at most what is left of them, and is refused with status 429 where
    that is nothing. Calls open at the same time do not know of each other's. None = no limit."""
    allow_constrained: bool = False
    """Training rollouts may ask for answers of a form: a JSON schema (`response_format`, `text.format`), a forced tool call (`tool_choice`). Such an
    answer's log-probabilities are not the policy's, so its tokens are context and never trained on (counted: `calls_constrained`).
    False: such calls are refused in training, unless the rollout's metadata has `allow_constrained: true`."""
    proxy: Literal["haproxy", "serve"] = "haproxy"
    """Ray Serve's front proxy: HAProxy (6x the requests/s) or Serve's own."""
    api_key_env: Annotated[str, Field(min_length=1)] | None = None
    """Name of an environment variable of the driver with the key that every call must bring, as a bearer token or as `x-api-key`; others
    are refused with status 401. Agents get it in their LLM resource, which is in the run's journal. None: any key will do."""


class LearnerConfig(Section):
    backend: Literal["native", "verl"] = "native"
    """Who computes. native: torch and our own losses (agl_ray/learner/step.py). verl: verl's FSDP2 engine, its policy losses and its checkpoints, in
    the environment `verl_env`, for whoever runs verl already; what it does not do (agl_ray/config/verl.py) is refused."""
    verl_env: str = ".venv-verl"
    """backend verl: folder of the Python environment that its ranks run in (`make venv-verl`), on every node that has one of them."""
    world_size: Positive = 1
    """FSDP ranks (one Ray actor each)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon (arXiv 2502.16982): matrices inside the layers are moved along their orthogonalised momentum (0.95, Nesterov), by updates of the size of
    AdamW's; embeddings, output head, norms, biases and experts fused into one tensor by AdamW, as a critic. 4 bytes of state per matrix element
    instead of 8; every rank gathers and orthogonalises each matrix whole, so that more ranks do not make the update faster. Refused with lora and cpu_offload."""
    lr: PositiveFloat = 2e-4
    """Highest learning rate, after warm-up."""
    warmup_steps: NonNegative = 0
    """Linear warm-up in optimiser updates."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How `lr`, and a critic's, fall with the steps of the run (`train.steps`) to `final_lr_share` of themselves. All updates of a step have one rate. Steps
    without signal count, so that a run ends where it was meant to; one resumed with other `train.steps` falls by the new number."""
    final_lr_share: Fraction = 0.1
    """schedule linear and cosine: what is left of the rates at the end."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, apart from the gradient."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: PositiveFloat = 1.0
    """Global-norm clipping."""
    minibatches: Positive = 1
    """Optimiser updates per batch; more than 1 makes the ratio clip active."""
    tokens_per_microbatch: Positive = 4096
    """Token budget of one packed forward pass (a longer single row still goes alone)."""
    max_row_tokens: Positive = 1024
    """A row (conversation) longer than this is dropped or cut (`trajectory.overlong`) after the advantages are taken, and counted. A run that
    does not give it takes `engine.max_model_len`, which no conversation exceeds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute format of the forward pass (FSDP mixed precision); parameters stay float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and compute the rest again in the backward pass: less memory per token, about a third more time."""
    cpu_offload: bool = False
    """Keep weights, gradients and the optimiser's state of the policy (and of critic and reference) in the machine's memory, 16 bytes per trained
    parameter over the ranks together; a layer's weights are copied to the GPU for its turn, and the update runs on the CPU. Slower, for models that do
    not fit otherwise. Refused with `num_gpus` 0. Its parts are tested on a CPU; it has not been run on a GPU."""
    lora: LearnerLoraConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; `{}` turns it on. It wants five to ten times the `lr`. The engines
    and the export get the weights with the adapters merged in; with `per_role` the engines get the adapters, and the export a model of each role.
    A critic is trained whole. None = train all weights."""
    critic: CriticConfig = CriticConfig()
    """The critic of `algorithm.advantage: gae` (PPO): a second model of the policy's size in the same ranks."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    """CPUs that Ray reserves for one rank."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per rank; 0 = CPU with Gloo, else NCCL."""
    step_timeout_seconds: PositiveFloat = 600.0
    """Deadline of one update, of one checkpoint, of one restart."""

    @model_validator(mode="after")
    def _fits_together(self) -> LearnerConfig:
        if self.optimizer == "muon" and self.lora is not None:
            raise ValueError(
                "learner.optimizer muon orthogonalises whole matrices, and with learner.lora only their low-rank factors are trained; say adamw"
            )
        if self.optimizer == "muon" and self.cpu_offload:
            raise ValueError(
                "learner.optimizer muon multiplies matrices, which learner.cpu_offload would leave to the CPU; say adamw, or leave cpu_offload out"
            )
        if self.cpu_offload and self.num_gpus == 0:
            raise ValueError(
                "learner.cpu_offload keeps weights out of a GPU's memory, and with learner.num_gpus 0 they are in the machine's memory anyway; "
                "leave it out"
            )
        if self.schedule == "constant" and self.final_lr_share != 0.1:
            raise ValueError(
                "learner.final_lr_share acts with learner.schedule linear or cosine only; leave it out"
            )
        return self


class WeightsConfig(Section):
    transport: Literal["auto", "gloo", "nccl", "object_store"] = "auto"
    """How weights reach the engines: auto = nccl where both sides have GPUs, else gloo; object_store is the fallback."""
    bucket_mib: PositiveFloat = 64.0
    """Size of one transfer bucket."""
    timeout_seconds: PositiveFloat = 60.0
    """Deadline of one weight update, from the order to the last engine's checksum."""


class PoolConfig(Section):
    """Connections to a database server. What is not given is taken from DB_POOL_SIZE, DB_MAX_OVERFLOW, DB_POOL_TIMEOUT,
    DB_POOL_RECYCLE, DB_POOL_PRE_PING, else it is 5, 10, 30 s, 1800 s, true."""

    size: Positive | None = None
    """Connections kept open."""
    max_overflow: NonNegative | None = None
    """Further connections under load."""
    timeout: PositiveFloat | None = None
    """Seconds to wait for a connection."""
    recycle: float | None = None
    """Seconds after which a connection is replaced; -1 = never."""
    pre_ping: bool | None = None
    """Ask a connection whether it lives before using it."""


class StoreConfig(Section):
    url: str | None = None
    """Journal: `sqlite:///path`, `postgresql://user:password@host:port/database`, `mongodb://host:port/database`, or `memory://`, which
    keeps nothing (tests). None: the environment's DATABASE_URL, else `sqlite:///RUN_FOLDER/store.db`. A password is not written to config.json."""
    run_id: str | None = None
    """Part of every key, so that runs share a database; None = the run folder's name."""
    payload: str = "journal"
    """Where span payloads go: `journal`, or a URI of pyarrow.fs (`file:///path`, `s3://bucket/path?region=...&endpoint_override=...`,
    `gs://...`). Keys come from the environment, never from here."""
    encryption: Literal["off", "aes-gcm", "fernet"] = "off"
    """Of inputs, prompts, responses and resources at rest; keys: AGL_ENCRYPTION_KEYS, comma separated, newest first."""
    pool: PoolConfig = PoolConfig()
    mongodb_database: str | None = None
    """Where a mongodb URL names no database; None = MONGODB_DATABASE, else agl_ray."""
    cache_mib: PositiveFloat = 256.0
    """Span payloads kept in memory; older ones are read back from the journal."""
    memory_mib: PositiveFloat = 256.0
    """Records (rollouts, attempts, resources) kept in memory; finished ones are read back from the journal."""
    door: bool = False
    """Open the store's HTTP doors (REST, OTLP, agent-lightning 1.0) beside the gateway, under /v1, /api and /proxy. Callers show AGL_STORE_API_KEY
    where that is set; without it gateway.host must be an address of this machine alone."""

    @field_validator("payload")
    @classmethod
    def _no_keys(cls, given: str) -> str:
        return without_keys(given)


class TrainConfig(Section):
    steps: Positive = 40
    """Training steps (weight versions made)."""
    staleness: NonNegative = 0
    """Most weight versions between the making of a sample's first token and its training. 0 = synchronous."""
    checkpoint_every: Positive = 10
    """Steps between checkpoints; the last step is always saved. Steps since the last one are replayed from the store."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address (`host:port`, `ray://host:port`); None = RAY_ADDRESS where set (as under `ray job submit`), else a local Ray."""
    local_cpus: Positive | None = None
    """CPUs that a local Ray claims to have; None = what the machine has. Refused together with an address."""
    object_store_mib: Positive = 256
    """Object store of a local Ray."""


class RunConfig(Section):
    """One run. Top-level keys of the YAML file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    """Name of the run; the run folder is `runs/<name>-<date>-<time>`. Letters, digits, dot, dash, underscore."""
    seed: NonNegative = 0
    """Seed of model making, data order and sampling."""
    runs_dir: Path = Field(default=Path("runs"), validate_default=False)
    """Where run folders are made."""
    cache_dir: Path = Field(default=Path(".cache"), validate_default=False)
    """Where made base models are kept."""
    agent: AgentKey | None = None
    """`file.py:function` or `module:function` of an `@agl.rollout` function or LitAgent, or `{command: [...]}`, a program in any language
    (`agl_ray.agents.command` says what it gets); None only from Python (`Trainer.fit(agent)`)."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutSection = RolloutSection()
    validation: ValidationConfig = ValidationConfig()
    runners: RunnersConfig = RunnersConfig()
    tracing: TracingConfig = TracingConfig()
    judge: JudgeConfig = JudgeConfig()
    engine: EngineConfig = EngineConfig()
    gateway: GatewayConfig = GatewayConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    credit: CreditConfig = CreditConfig()
    roles: dict[RoleName, RoleConfig] = {}
    """Role -> who answers the calls that the agent makes under it: train, frozen, or a section with `kind`. An agent gets at them with
    `ctx.llm("planner")`; calls without a role go to the run's own engine."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    store: StoreConfig = StoreConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def rollouts_per_step(self) -> int:
        return self.rollout.groups_per_step * self.rollout.group_size

    @property
    def adapters(self) -> list[str]:
        """The roles with an adapter of their own (`learner.lora.per_role`), sorted; [] where all that is trained has the same weights."""
        if self.learner.lora is None or not self.learner.lora.per_role:
            return []
        return sorted(name for name, role in self.roles.items() if role.kind == "train")

    @model_validator(mode="after")
    def _no_row_is_too_long(self) -> RunConfig:
        """Where `learner.max_row_tokens` is not given, a row of the engine's longest conversation is trained on."""
        if "max_row_tokens" not in self.learner.model_fields_set:
            longest = {"max_row_tokens": self.engine.max_model_len}
            object.__setattr__(self, "learner", self.learner.model_copy(update=longest))  # frozen
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.rollout.min_group > self.rollout.group_size:
            raise ValueError(
                f"rollout.min_group ({self.rollout.min_group}) is larger than rollout.group_size ({self.rollout.group_size}): no group could ever be trained on"
            )
        if (self.rollout.max_tokens or 0) >= self.engine.max_model_len:
            raise ValueError(
                f"rollout.max_tokens ({self.rollout.max_tokens}) leaves no room for a prompt in engine.max_model_len ({self.engine.max_model_len})"
            )
        needed = _UNIT_OF_ADVANTAGE.get(self.algorithm.advantage, self.credit.unit)
        if self.credit.unit != needed:
            raise ValueError(
                f"algorithm.advantage {self.algorithm.advantage} needs credit.unit {needed}, got {self.credit.unit}"
            )
        if self.algorithm.zero_signal == "refill" and self.credit != CreditConfig():
            changed = sorted(
                name for name, value in self.credit if value != getattr(CreditConfig(), name)
            )
            raise ValueError(
                f"algorithm.zero_signal refill knows a group's advantages from its rollouts' rewards alone, and credit.{changed[0]} "
                f"{getattr(self.credit, changed[0])!r} makes them of more; leave credit as it is or say algorithm.zero_signal: keep"
            )
        if self.algorithm.advantage == "gigpo" and self.credit.outcome == "broadcast":
            raise ValueError(
                "algorithm.advantage gigpo adds up the rewards of calls: with credit.outcome broadcast the rollout's own reward would "
                "count once for every call; say last or none"
            )
        if self.algorithm.loss == "kl_cov" and self.learner.minibatches == 1:
            raise ValueError(
                "algorithm.loss kl_cov penalises what has moved since the start of the batch, and with learner.minibatches 1 nothing has; say "
                "2 or more"
            )
        if self.credit.unit == "call":
            most = min(
                self.rollout.max_tokens or self.engine.max_model_len, self.engine.max_model_len
            )
            check_reachable(self.algorithm, most)
        check_sides(self.credit, self.roles)
        check_temperature(self.algorithm.teacher, self.rollout.temperature)
        check_verl(self)
        check_baseline(self.algorithm, self.credit, self.learner.critic, self.rollout.min_group)
        if self.learner.lora is not None and self.learner.lora.per_role and not self.adapters:
            raise ValueError(
                "learner.lora.per_role trains an adapter for each role of kind train, and roles has none; name them there or leave per_role out"
            )
        if self.weights.transport == "nccl" and not (
            self.engine.num_gpus and self.learner.num_gpus
        ):
            raise ValueError(
                "weights.transport nccl needs engine.num_gpus and learner.num_gpus above 0; use gloo or auto on CPU"
            )
        if self.engine.num_gpus == 0 and self.engine.gpu_memory_utilization != 0.8:
            raise ValueError(
                "engine.gpu_memory_utilization has no effect with engine.num_gpus 0; leave it out"
            )
        if self.cluster.address is not None and self.cluster.local_cpus is not None:
            raise ValueError(
                "cluster.local_cpus applies to a local Ray only; leave it out where cluster.address is given"
            )
        return self


_UNIT_OF_ADVANTAGE = {"rae": "role", "gigpo": "call"}
"""Advantages that are made of one kind of units only."""
