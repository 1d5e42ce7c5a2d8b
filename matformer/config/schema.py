"""What a run is: every key of a config, with its unit. `load.py` fills it, `check.py` holds rules between keys."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from matformer.config.budget import budgeted_leaves

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Ratio = Annotated[float, Field(ge=0.0)]
MediaObjective = Literal["flow", "ddpm_eps", "ddpm_v"]
"""What a Coda of latents predicts, and the path between clean and noise that goes with it."""
TimeConditioning = Literal["none", "add", "token", "adaln_preludio_coda", "adaln_atto"]
TimeSampler = Literal["uniform", "logit_normal", "mode"]
LossWeighting = Literal["none", "min_snr", "cosmap"]
MediaContext = Literal["clean_copy", "noised"]
CodaKind = Literal["linear", "mlp", "dit"]
Recompute = Literal["none", "selective", "full"]
Dtype = Literal["float32", "bfloat16"]
Ngrams = tuple[Annotated[int, Field(ge=2)], ...]


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AttoConfig(Section):
    """The global transformer over latents."""

    width: Positive = Field(description="H, width of a latent")
    layers: Positive
    heads: Positive = Field(description="A, query heads")
    kv_heads: Positive = Field(description="G, key/value heads")
    ffn_width: Positive = Field(description="inner width of SwiGLU")
    rotary_pairs: tuple[Natural, Natural, Natural, Natural] = Field(
        description="pairs of a head's K/2 given to document, t, y, x"
    )
    qk_norm: bool = Field(default=True, description="norm queries and keys; BLT and Llama do not")
    rotary_base: float = Field(default=10_000.0, gt=1.0, description="of the document axis")
    media_rotary_base: float = Field(default=100.0, gt=1.0, description="of the axes t, y, x")
    norm_epsilon: float = Field(default=1e-5, gt=0.0)


class TextConfig(Section):
    """Preludio and Coda for text: bytes, or the pieces of a vocabulary."""

    vocabulary: Positive | None = Field(
        default=None,
        description="for data.patcher.kind tokens: pieces of its model, a latent each, without any layer over bytes",
    )
    objective: Literal["ar", "masked_diffusion", "block_diffusion"] = Field(
        default="ar", description="ar: the next symbol; masked_diffusion (LLaDA); block_diffusion (BD3-LM)"
    )
    patch_bytes: Positive = Field(
        default=4, description="diffusion objectives: symbols of a patch; data.patcher.patch_bytes says the same"
    )
    block_patches: Positive = Field(default=4, description="block_diffusion: patches of a block")
    width: Positive = Field(description="D, width of a byte; divides atto.width")
    heads: Positive
    ffn_width: Positive
    preludio_layers: Natural = Field(description="local causal layers before pooling")
    coda_layers: Positive
    window: Positive = Field(default=64, description="W, symbols that a symbol may look back, itself included")
    rotary_base: float = Field(default=10_000.0, gt=1.0, description="of the local layers")
    preludio_pool: Literal["mean", "max"] = Field(
        default="mean", description="what a patch asks its symbols with: their mean, or (BLT) their maximum, projected"
    )
    preludio_places: bool = Field(default=True, description="tell a symbol its place in its patch; BLT does not")
    preludio_ngrams: Ngrams = Field(default=(3, 4, 5, 6, 7, 8), description="sizes of hashed n-grams; [] has none")
    coda_input: Literal["embedding", "preludio"] = Field(
        default="embedding",
        description="the Coda's input: an embedding of its own, or (BLT) the Preludio's symbols before pooling; pp = 1",
    )
    coda_ngrams: Ngrams = Field(
        default=(2, 3, 4), description="the same for the Coda's embedding; with coda_input preludio it has none"
    )
    predicts_end: bool = Field(
        default=False, description="the Coda says after each byte whether its patch ends: for data.patcher.kind bpe"
    )
    coda_projection: bool = Field(default=False, description="a matrix between a latent and its slots, as in BLT")
    ngram_rows: Positive = Field(default=8192, description="rows of the table of each size")
    ngram_gain: float = Field(default=8.0, gt=0.0, description="on what the tables give: they start at zero")


def loss_name(objective: str, *, predicts: str) -> str:
    """What a medium's loss is called in metrics: losses of different objectives are not to be compared.

    predicts: what the Coda predicts under `next_latent`.
    """
    return f"next_latent_{predicts}_loss" if objective == "next_latent" else f"{objective}_loss"


class NextLatentConfig(Section):
    """Of objective `next_latent`."""

    predicts: MediaObjective = Field(default="flow", description="what the Coda predicts of each noised patch")
    noises: Positive = Field(default=4, description="K, noises of each patch of a generated span, each with its own t")


class BudgetConfig(Section):
    """Fewer latents for a span: where the clean latent varies little, a block of patches becomes one (quad-tree)."""

    share: float = Field(gt=0.0, le=1.0, description="most latents of a copy, as a share of its patches")
    levels: Positive = Field(default=2, description="a latent stands for at most 2^levels patches a side")
    noised_tree: Literal["none", "own", "shuffled"] = Field(
        default="none",
        description="noised copies have every patch; or stand in the tree of their clean latent, which tells where "
        "detail is and is predicted from the header in sampling; shuffled (a control): in another medium's tree",
    )


class MediaConfig(Section):
    """A latent modality: any grid of VAE latents."""

    channels: Positive = Field(description="C, channels of the autoencoder's latent")
    rank: Literal[1, 2, 3] = Field(description="grid axes: 1 audio (t), 2 images (y, x), 3 video (t, y, x)")
    patch: Positive = Field(description="latent cells of a patch along each axis")
    buckets: tuple[tuple[Positive, ...], ...] = Field(description="shapes of the grid, in latent cells, ascending")
    coda_width: Positive = Field(description="inner width of the Coda's blocks")
    coda_layers: Positive = Field(default=2, description="residual blocks of the Coda; linear has none")
    coda: CodaKind = Field(
        default="mlp",
        description="from a latent and its noised patch to the answer: linear maps, a residual MLP a patch, or (DiT) "
        "the same with attention to the span's other patches before each block",
    )
    unet_width: Natural = Field(
        default=0,
        description="channels of convolutions over latent cells, in the Preludio before patches are cut and in the "
        "Coda after they are predicted (a U-Net of one level); 0 has none",
    )
    coda_heads: Positive = Field(default=4, description="dit: heads of its attention; divides coda_width")
    coda_window: Positive = Field(
        default=64, description="dit: patches that a patch looks ahead and back in raster order, itself included"
    )
    channel_variance: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        default=None,
        description="of each channel, normalised; for `precondition: channel`, from the data set's manifest if absent",
    )
    normalisation: Literal["one_scale", "per_channel"] = Field(
        default="one_scale",
        description="of latents, from the data set's manifest: a shift a channel and one scale that makes their mean "
        "variance 1, or a scale a channel, which tells the loss that all channels weigh the same",
    )
    latent_noise: str = Field(
        default="moments",
        pattern=r"^(moments|none|fixed:([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?)$",
        description="drawn onto a latent each time it is read: moments, from the log-variance stored beside its mean "
        "(a deterministic autoencoder's have none: nothing); none; or fixed:0.1, of this deviation, normalised",
    )
    precondition: Literal["channel", "unit", "none"] = Field(
        default="channel",
        description="scales around the network: by each channel's variance, as if all were 1, or no scales at all",
    )
    objective: MediaObjective | Literal["next_latent"] = Field(
        default="flow",
        description="what the Coda predicts: velocity on the straight path; epsilon or v on DDPM's cosine schedule; or "
        "(LatentLM) patch after patch, each denoised from the latent of the position before it",
    )
    next_latent: NextLatentConfig = NextLatentConfig()
    loss_weighting: LossWeighting = Field(
        default="none", description="of a span's squared errors by its t; cosmap is for objective flow"
    )
    min_snr_gamma: float = Field(default=5.0, gt=0.0, description="loss_weighting min_snr: largest weight of clean x")
    time_conditioning: TimeConditioning = Field(
        default="add",
        description="how the network is told t: a vector added in Preludio and Coda, a position at the head of the "
        "noised span, AdaLN in Preludio and Coda, or AdaLN in the Atto's layers at this modality's patches; under "
        "objective next_latent the Coda alone is told",
    )
    budget: BudgetConfig | None = Field(
        default=None, description="of clean copies: given spans, and what follows a generated one; none: every patch"
    )

    @property
    def fixed_noise(self) -> float:
        """The deviation of `latent_noise: fixed:...`, normalised; 0 under the others."""
        kind, _, deviation = self.latent_noise.partition(":")
        return float(deviation) if kind == "fixed" else 0.0

    def grid(self, bucket: int) -> tuple[int, ...]:
        """Patches along each axis of a shape bucket."""
        return tuple(cells // self.patch for cells in self.buckets[bucket])

    @property
    def noises_trees(self) -> bool:
        """Whether noised copies stand in trees, so that a tree is predicted before a span is sampled."""
        return self.budget is not None and self.budget.noised_tree != "none"

    def noised_latents(self, bucket: int) -> int:
        """Most latents of a span's noised copy."""
        return self.clean_latents(bucket) if self.noises_trees else math.prod(self.grid(bucket))

    def clean_latents(self, bucket: int) -> int:
        """Most latents of a span's clean copy."""
        if self.budget is None:
            return math.prod(self.grid(bucket))
        return budgeted_leaves(self.grid(bucket), share=self.budget.share, levels=self.budget.levels)

    @property
    def causal(self) -> bool:
        """Whether its patches stand in the sequence once, clean, each seeing those before it."""
        return self.objective == "next_latent"

    @property
    def prediction(self) -> MediaObjective:
        """What the Coda predicts of a noised patch."""
        return self.next_latent.predicts if self.objective == "next_latent" else self.objective

    @property
    def loss_name(self) -> str:
        """Of its loss in metrics."""
        return loss_name(self.objective, predicts=self.next_latent.predicts)

    @property
    def places(self) -> tuple[int, int, int]:
        """Most patches along t, y and x; 1 on an axis that the modality lacks."""
        longest = [max(bucket[axis] for bucket in self.buckets) // self.patch for axis in range(self.rank)]
        along = dict(zip({1: "t", 2: "yx", 3: "tyx"}[self.rank], longest, strict=True))
        return along.get("t", 1), along.get("y", 1), along.get("x", 1)

    @property
    def patch_scalars(self) -> int:
        """F: scalars of one patch."""
        return self.channels * self.patch**self.rank


class RouterConfig(Section):
    """The probe that says what comes next."""

    recurrent: bool = Field(default=False, description="whether the class `recurrent` may be answered")


class ModelConfig(Section):
    """Sizes of the model; `media` names the latent modalities in their order."""

    atto: AttoConfig
    text: TextConfig
    media: dict[str, MediaConfig]
    router: RouterConfig = RouterConfig()
    media_context: MediaContext = Field(
        default="clean_copy",
        description="what follows a generated span sees: a clean copy of it, or (Transfusion) its noised patches",
    )

    def __hash__(self) -> int:
        return hash((self.atto, self.text))  # of equal models the same; `media` has no hash

    @property
    def diffuses_text(self) -> bool:
        """Whether text is learned by filling in what is masked, both ways."""
        return self.text.objective != "ar"

    def most_copies(self, media: MediaConfig) -> int:
        """How often the patches of one of its spans stand in the sequence at most."""
        return 1 if media.causal or self.media_context == "noised" else 2

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of their indices; text is 0."""
        return ("text", *self.media)


class PatcherConfig(Section):
    """Where text patches begin."""

    kind: Literal["static", "space", "entropy", "entropy_monotonic", "bpe", "tokens"] = "static"
    patch_bytes: Positive = Field(default=4, description="symbols of a static patch")
    max_patch_bytes: Positive = Field(default=16, description="longest patch of any patcher")
    threshold: float | None = Field(
        default=None,
        gt=0.0,
        description="entropy kinds: nats above which a patch begins; data_prep.score_entropy picks it",
    )
    entropy_model: str | None = Field(
        default=None, description="entropy kinds: folder of data_prep.train_entropy_model"
    )
    sentencepiece: str | None = Field(default=None, description="bpe, tokens: file of data_prep.train_sentencepiece")


class SourceConfig(Section):
    """One corpus of the mixture."""

    path: str = Field(description="data set folder under data.root, holding the splits train/ and heldout/")
    form: Literal["text", "pairs", "documents"]
    modality: str | None = Field(default=None, description="form pairs: the latent modality")
    shows: Literal["both", "caption", "medium"] = Field(
        default="both", description="form pairs: what a document holds; of one alone nothing else is seen"
    )
    weight: float = Field(gt=0.0, description="share of the mixture, in latents")
    generate_probability: Fraction = Field(
        default=0.7, description="form pairs: chance of caption -> media; otherwise media -> caption"
    )
    main_language: str = Field(default="en", description="form pairs: the caption language drawn most")
    main_language_probability: Fraction = Field(default=0.5, description="chance of it; else any of the others")


class DataConfig(Section):
    """What is read, and how it becomes sequences."""

    root: str = Field(description="folder of prepared data sets")
    recipe: Literal["demo"] | None = Field(
        None, description="built-in recipe that prepares data.root when it is missing"
    )
    lanes: Positive = Field(description="independent streams; a multiple of train.global_batch")
    sequence_latents: Positive = Field(description="S, latents of a sequence")
    patcher: PatcherConfig = PatcherConfig()
    sources: dict[str, SourceConfig]
    blind_probability: Fraction = Field(
        default=0.1, description="share of generated spans without their condition; 0: no guidance"
    )
    time_sampler: TimeSampler = Field(
        default="logit_normal", description="law of u before the shift; mode: SD3's, with scale 1.29"
    )
    time_shift: float = Field(default=1.0, gt=0.0, description="s of t = s u / (1 + (s - 1) u)")
    max_bad_samples: Natural = Field(default=16, description="damaged samples that are skipped before the run stops")


class ParallelConfig(Section):
    """Degrees of parallelism; ranks = tp * cp * pp * dp."""

    tp: Positive = 1
    cp: Positive = Field(default=1, description="ranks that each hold a chunk of the positions of the same sequences")
    pp: Positive = 1
    dp: Positive = 1
    virtual_stages: Positive = Field(default=1, description="stages a pipeline rank (interleaved schedule; pp > 1)")
    stage_layers: tuple[Positive, ...] | None = Field(
        default=None, description="layers of each of the pp * virtual_stages stages, in running order; null: equal"
    )
    recompute: Recompute = Field(
        default="none", description="in backward: selective, each layer's feed-forward and attention; full, each layer"
    )
    offload_optimizer: bool = Field(default=False, description="ZeRO 2 and 3: masters and moments in CPU memory")
    sequence_parallel: bool = Field(default=False, description="shard the norms along the sequence (tp > 1)")
    zero_stage: Literal[1, 2, 3] = 1
    balance_ranks: Positive = Field(
        default=8, description="most data-parallel ranks that deal their rows out by FLOPs; each reads the rows of all"
    )
    dtype: Dtype = "float32"
    host: Literal["megatron", "plain"] = Field(default="megatron", description="plain: one rank, torch alone")
    threads: Natural = Field(default=0, description="CPU threads a rank; 0: OMP_NUM_THREADS, else a share of the cores")
    timeout_seconds: Positive = Field(default=600, description="limit of one collective")

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def share_ranks(self) -> int:
        """How many ranks hold one microbatch."""
        return self.tp * self.cp

    @property
    def reduce_ranks(self) -> int:
        """How many ranks hold the same weights."""
        return self.cp * self.dp

    def layers_of_stages(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage, in running order: stage s stands on pipeline rank s % pp."""
        stages = self.pp * self.virtual_stages
        return self.stage_layers or (layers // stages,) * stages


class LossWeights(Section):
    """Weight of each part of the loss; a latent modality without an entry of its own has weight `media`."""

    text: Ratio = 1.0
    router: Ratio = 0.1
    media: Ratio = 1.0
    by_modality: dict[str, Ratio] = {}


class TrainConfig(Section):
    """Optimisation."""

    steps: Positive
    global_batch: Positive = Field(description="sequences a step, over all ranks")
    micro_batch: Positive = Field(description="most sequences of one forward; divides global_batch / dp if smaller")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0.0, description="peak learning rate")
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Natural = 0
    decay_fraction: Fraction = Field(default=0.2, description="wsd: share of the steps that decay, at the end")
    min_lr_ratio: Fraction = Field(default=0.05, description="over the peak, at the end: behind the last step")
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: Ratio = Field(default=0.1, description="on matrices; norms, biases and embeddings have none")
    clip: Ratio = Field(default=1.0, description="largest global gradient norm; 0 does not clip")
    ema_decay: Fraction = Field(default=0.999, description="d of min(d, (1 + n) / (10 + n))")
    loss_weights: LossWeights = LossWeights()


class EvalConfig(Section):
    """Held-out evaluation during training."""

    every_steps: Natural = Field(default=200, description="0 evaluates only at the end")
    text_bytes: Natural = Field(default=60_000, description="bytes of held-out text, whole documents")
    media_spans: Natural = Field(default=64, description="held-out spans of each latent modality")
    final_text_bytes: Natural | None = Field(default=None, description="text_bytes when the run is done, if others")
    final_media_spans: Natural | None = Field(default=None, description="media_spans when the run is done, if others")
    captioned_spans: Natural = Field(default=128, description="held-out media of the caption test when the run is done")
    judged_samples: Natural = Field(
        default=0, description="pictures that are drawn from held-out captions and judged when the run is done"
    )


class RunSection(Section):
    """The run folder and what is written into it."""

    folder: str = Field(default="runs", description="parent folder; the run lives in folder/name")
    resume: Literal["auto", "branch"] = Field(default="auto", description="branch: a changed config may go on here")
    save_every_steps: Positive = 200
    keep_checkpoints: Positive = 2
    log_every_steps: Positive = 1
    gradients_every_steps: Natural = Field(
        default=0,
        description="log cosines and norm ratios of the losses' gradients on each layer of the Atto (gradients/...); "
        "costs a forward and a backward for each loss, and two float32 copies of the Atto for each; 0 never does",
    )
    max_skipped_steps: Positive = Field(
        default=20, description="steps in a row whose gradient is not finite before the run ends with a failure"
    )
    wandb: Literal["offline", "online", "disabled"] = "offline"
    report: bool = Field(default=True, description="write report.html at the end")


class RunConfig(Section):
    """A whole run: one model, one data mixture, one plan."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Natural = 0
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    run: RunSection = RunSection()

    @property
    def microbatches(self) -> int:
        """Of one step on one rank."""
        return self.train.global_batch // (self.parallel.dp * self.train.micro_batch)
