"""What a rank's memory holds at the fullest moment of a step, part by part.

The planner's capacity, the statement before training and the prediction beside the measured peak
all come from here. Bytes are those of tensors, as a GPU's allocator counts them at its peak;
contexts, NCCL and fragmentation are the device's `reserved_gib`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_attn.config import Config
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.peers import slot_bytes_per_token
from dist_attn.planner.shape import ModelShape

GIB = 1 << 30
#: DeepSpeed's stage3_max_live_parameters: parameters that may be whole at a time.
_MAX_LIVE_PARAMETERS = 1_000_000_000
#: Workspaces of matrix products, attention kernels and gradients of single parameters.
_WORKSPACE_BYTES = 160 << 20
#: The part that is messages of other GPUs; torch's allocator does not count it.
SLOTS = "peer slots"


@dataclass(frozen=True)
class Sharding:
    """How parameters, gradients and optimizer state lie on the ranks."""

    zero_stage: int = 2
    engine: str = "deepspeed"
    bucket_elements: int = 1_000_000
    optimizer: str = "adamw"
    #: Parts that lie in the host's memory.
    offload_optimizer: bool = False
    offload_parameters: bool = False
    #: Parameters that are trained; None: all.
    trained_parameters: int | None = None
    #: Of a group whose GPUs copy to each other.
    slot_bytes_per_token: int = 0

    @classmethod
    def from_config(
        cls, config: Config, shape: ModelShape, cluster: Cluster | None = None
    ) -> Sharding:
        """Read it from a run's configuration; messages' slots are those of a cluster."""
        return cls(
            zero_stage=config.engine.zero_stage,
            engine=config.engine.name,
            bucket_elements=config.engine.bucket_elements,
            optimizer=config.optimizer.name,
            offload_optimizer=config.engine.offload_optimizer,
            offload_parameters=config.engine.offload_parameters,
            trained_parameters=adapter_parameters(config, shape),
            slot_bytes_per_token=slot_bytes_per_token(config.attention, shape, cluster),
        )


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be fullest."""

    name: str
    #: Parts beside the static ones: bytes, and bytes per token of the rank.
    constant: tuple[tuple[str, int], ...]
    per_token: tuple[tuple[str, int], ...]

    @property
    def constant_bytes(self) -> int:
        """All constant parts."""
        return sum(size for _, size in self.constant)

    @property
    def bytes_per_token(self) -> int:
        """All parts that grow with tokens."""
        return sum(size for _, size in self.per_token)

    def bytes_at(self, tokens: int) -> int:
        """Bytes beside the static parts."""
        return self.constant_bytes + tokens * self.bytes_per_token


@dataclass(frozen=True)
class MemoryModel:
    """The parts of one rank's memory.

    Two moments compete: the end of the forward, when the loss works beside everything that layers
    have kept, and the backward of the last layer.

    A layer keeps, per token and beside what recomputation spares: its input, the outputs of its two
    norms and of its first half, rotated queries, keys, values, attention's output and normaliser,
    and three tensors of the MLP; torch's own kernels (`shape.fused` false) also a float32 copy in
    each norm and a fourth tensor of the MLP. Megatron's keep no copy in norms, but queries, keys
    and values before their rotation in one tensor, sines and cosines, and five tensors of the MLP.
    """

    static: tuple[tuple[str, int], ...]
    moments: tuple[Moment, ...]

    @classmethod
    def of(cls, shape: ModelShape, world_size: int, sharding: Sharding) -> MemoryModel:
        """Work the parts out.

        Args:
            shape: what one rank computes of the model (its share under tensor parallelism).
            world_size: ranks over which ZeRO divides.
            sharding: how.
        """
        shape = replace(shape, megatron=sharding.engine == "megatron")
        c, e = shape.hidden_size * shape.bytes_per_element, shape.bytes_per_element
        kept = shape.num_layers * kept_bytes_per_token(shape)
        shared = 2 * shape.head_dim * (4 if shape.fused else e) + 40
        weight = shape.vocab_size * shape.hidden_size
        if sharding.trained_parameters is not None:
            weight = 0  # frozen: no gradient
        slots = ((SLOTS, sharding.slot_bytes_per_token),)
        # Of every token the last norm's input and output, and the gradient of that.
        logits, per_token = 8 * shape.loss_chunk_tokens * shape.vocab_size, 3 * c
        if shape.fused_loss:
            # Liger's chunks have logits as large as all hidden states, or twice so.
            logits, per_token = 0, 5 * c
        loss = Moment(
            "the loss",
            (("loss", (4 + e) * weight + logits), ("workspace", _WORKSPACE_BYTES)),
            (("activations", kept + shared), ("loss", per_token), *slots),
        )
        work, tile = _work(shape)
        backward = Moment(
            "the backward",
            # The vocabulary's gradient is there already: as it came, widened, and in a bucket.
            (
                ("layer at work", tile),
                ("workspace", _WORKSPACE_BYTES),
                ("loss", 0 if sharding.engine == "megatron" else (8 + e) * weight),
            ),
            (("activations", kept + shared), ("layer at work", work + c), *slots),
        )
        return cls(_static(shape, world_size, sharding), (loss, backward))

    @property
    def slot_bytes_per_token(self) -> int:
        """Of each group in which a rank works."""
        return dict(self.moments[0].per_token)[SLOTS]

    @property
    def static_bytes(self) -> int:
        """What lies there whatever the tokens."""
        return sum(size for _, size in self.static)

    def fullest(self, tokens: int) -> Moment:
        """The moment of the peak."""
        return max(self.moments, key=lambda m: m.bytes_at(tokens))

    def bytes_at(self, tokens: int) -> int:
        """The peak of a rank that holds so many tokens."""
        return self.static_bytes + self.fullest(tokens).bytes_at(tokens)

    def binding(self, memory_bytes: int) -> Moment:
        """The moment that limits the tokens of a device."""
        free = memory_bytes - self.static_bytes
        return min(
            self.moments, key=lambda m: (free - m.constant_bytes) / max(m.bytes_per_token, 1)
        )

    def parts(self, tokens: int) -> dict[str, int]:
        """Bytes by part at the peak, static ones first; parts of nothing are left out."""
        moment = self.fullest(tokens)
        found = dict(self.static)
        for name, size in moment.constant:
            found[name] = found.get(name, 0) + size
        for name, size in moment.per_token:
            found[name] = found.get(name, 0) + tokens * size
        return {name: size for name, size in found.items() if size}

    def statement(self, tokens: int) -> str:
        """The peak and its parts in words, such as `61.2 GiB: parameters 2.1, ...`."""
        parts = [f"{name} {size / GIB:.1f}" for name, size in self.parts(tokens).items()]
        return f"{self.bytes_at(tokens) / GIB:.1f} GiB: {', '.join(parts)}"


def adapter_parameters(config: Config, shape: ModelShape) -> int | None:
    """Parameters of `model.lora`; None where the whole model is trained."""
    lora = config.model.lora
    if lora is None:
        return None
    c, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    both = {"q_proj": c + q, "k_proj": c + kv, "v_proj": c + kv, "o_proj": q + c,
            "gate_proj": c + i, "up_proj": c + i, "down_proj": i + c}  # fmt: skip
    return lora.rank * shape.num_layers * sum(both[t] for t in lora.targets)


def kept_bytes_per_token(shape: ModelShape) -> int:
    """What the backward finds of one layer's forward."""
    c, q = shape.hidden_size, shape.num_heads * shape.head_dim
    if not shape.gradient_checkpointing:
        return layer_bytes_per_token(shape)
    e = shape.bytes_per_element
    attention = q * e + 4 * shape.num_heads if shape.keep_attention else 0
    # Of inputs that wait on the host two are on their way at a time.
    inputs = c * e
    if shape.offload_checkpoints:
        inputs = -(-2 * c * e // shape.num_layers)
    return inputs + attention


def layer_bytes_per_token(shape: ModelShape) -> int:
    """What a layer keeps that is not computed again."""
    c, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads
    kv *= shape.head_dim
    mlp = 0 if shape.mlp_tile_tokens else _mlp_tensors(shape) * shape.intermediate_size
    elements, norms = 4 * c + 2 * q + 2 * kv + mlp, 0
    if shape.megatron:
        elements += q + kv + 4 * shape.head_dim
    elif not shape.fused:
        norms = 2 * 4 * c
    return elements * shape.bytes_per_element + norms + 4 * shape.num_heads


def _mlp_tensors(shape: ModelShape) -> int:
    """Gate, up and their product; torch also keeps the activated gate, Megatron a second up."""
    if shape.megatron and not shape.mlp_tile_tokens:
        return 5
    return 3 if shape.fused else 4


def _work(shape: ModelShape) -> tuple[int, int]:
    """Bytes per token of a layer's backward beside what is kept, and of a tile of its MLP."""
    e, c, i = shape.bytes_per_element, shape.hidden_size, shape.intermediate_size
    # Gradients of the MLP's product (torch: and of both factors), then of its input, twice.
    mlp = (1 if shape.fused else 2 if shape.megatron else 3) * i
    again = 0
    if shape.gradient_checkpointing:
        # Its input, and its attention if that is kept, are there already.
        inputs = replace(shape, offload_checkpoints=False)
        again = layer_bytes_per_token(shape) - kept_bytes_per_token(inputs)
    if not shape.mlp_tile_tokens:
        return again + max(mlp, 2 * c) * e, 0
    # Float32 sums of the three projections' gradients live as long as the tiles.
    sums = 3 * 4 * c * i
    tensors = _mlp_tensors(shape) + (1 if shape.fused else 3)
    return again + 2 * c * e, sums + tensors * i * e * shape.mlp_tile_tokens


def _static(shape: ModelShape, world_size: int, sharding: Sharding) -> tuple[tuple[str, int], ...]:
    stage, e = sharding.zero_stage, shape.bytes_per_element
    n = shape.num_parameters
    trained = n if sharding.trained_parameters is None else sharding.trained_parameters
    shard, trained_shard = -(-n // world_size), -(-trained // world_size)
    parameters = (shard if stage >= 3 else n) * e
    if sharding.offload_parameters:
        parameters = 0
    gradients = (trained_shard if stage >= 2 else trained) * 4
    # ZeRO keeps float32 masters even of float32 parameters, plain DeepSpeed does not.
    master = 4 if stage >= 1 or e < 4 else 0
    moments = 8 if sharding.optimizer == "adamw" else 0
    states = (master + moments) * (trained_shard if stage >= 1 else trained)
    if sharding.offload_optimizer:
        gradients = states = 0
    return (
        ("parameters", parameters),
        ("gradients", gradients),
        ("optimizer", states),
        ("buffers", _buffers(shape, world_size, sharding)),
    )


def _buffers(shape: ModelShape, world_size: int, sharding: Sharding) -> int:
    """Buckets in float32, and under ZeRO-3 the parameters that are whole for a while."""
    if sharding.engine == "megatron":
        return 0  # its buffers are the gradients
    bucket = 4 * min(sharding.bucket_elements, shape.num_parameters)
    match sharding.zero_stage:
        case 0 | 1:
            return bucket
        case 2:
            # Two that are filled in turn, and a copy of the one that is being sent; alone, one.
            return (3 if world_size > 1 else 2) * bucket
        case _:
            live = min(shape.num_parameters, _MAX_LIVE_PARAMETERS) * shape.bytes_per_element
            return 2 * bucket + live
