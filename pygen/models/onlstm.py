"""A language model of ON-LSTM layers, by words or characters. Layers: pygen/nn/on_lstm.py; texts: pygen/data/text.py;
trees from its distances: onlstm_trees.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.data.text import EOS, Vocabulary
from pygen.models._onlstm_baseline import LSTMStack, State, equal_lstm, locked_dropout
from pygen.models.model import Model, arguments
from pygen.models.onlstm_trees import (
    Constituent,
    Tree,
    UnlabelledF1,
    balanced,
    default_layer,
    distances_to_tree,
    left_branching,
    parse_sentence,
    random_tree,
    read_trees,
    right_branching,
    unlabelled_f1,
    word_distances,
    write_trees,
)
from pygen.models.stacks import check_choice
from pygen.nn.on_lstm import ONLSTMStack
from pygen.reference._dtypes import widen

if TYPE_CHECKING:
    from pygen.data import Dataset

__all__ = [
    "ONLSTMLanguageModel",
    "Constituent",
    "LanguageModelOutput",
    "Tree",
    "UnlabelledF1",
    "balanced",
    "default_layer",
    "distances_to_tree",
    "left_branching",
    "parse_sentence",
    "random_tree",
    "read_trees",
    "right_branching",
    "unlabelled_f1",
    "word_distances",
    "write_trees",
]

RNNS = ("onlstm", "lstm")
# The softmax's weights are uniform up to it at first, and tied embeddings with them, as published. Embeddings that are
# not tied keep nn.Embedding's own scale: with ten times smaller ones, characters took half as many steps again.
_FIRST_WEIGHT = 0.1
# A text of a few megabytes by characters, on a laptop: the published sizes would take days and mostly regularise. After
# an epoch of a megabyte, chunks of 4 and 64 units were behind those of 16, and DropConnect of 0.1 behind none.
_OF_CHARACTERS = {
    "embedding_size": 128,
    "hidden_size": 256,
    "num_layers": 2,
    "chunk_size": 8,
    "dropout": 0.1,
    "dropouti": 0.0,
    "dropouth": 0.1,
    "dropoute": 0.0,
    "wdrop": 0.0,
    "alpha": 0.0,
    "beta": 0.0,
    "tied": False,
}


class LanguageModelOutput(NamedTuple):
    """What `ONLSTMLanguageModel.forward` returns.

    Attributes:
        logits: (T, B, V), of the next token.
        states: [(h (B, H_l), c (B, H_l))] of each layer, after the last step.
        distances: (2, L, T, B): 1 - mean(master forget gate), and mean(master input gate); L = 0 for an nn.LSTM.
        raw_output, output: (T, B, H_L), of the last layer before and after dropout.
    """

    logits: Tensor
    states: list[State]
    distances: Tensor
    raw_output: Tensor
    output: Tensor


class ONLSTMLanguageModel(Model):
    r"""The next word or character, from all before it: embedding, layers of ON-LSTM, and a softmax.

    .. math::
        L = -\frac{1}{T} \sum_t \ln p(w_{t+1} | w_{\le t})
            + \alpha\,\mathrm{mean}\,|\mathrm{dropout}(h_t)|^2 + \beta\,\mathrm{mean}\,|h_{t+1} - h_t|^2

    with h the last layer's output. The last two terms are of training only: in eval mode the loss is the first, in nats
    per token, of which exp is the perplexity and 1 / ln 2 the bits per character.

    Regularised as AWD-LSTM is: words are left out of the embedding (`dropoute`), DropConnect of the recurrent weights
    (`wdrop`), and dropout with one mask for all steps (`dropouti`, `dropouth`, `dropout`). The defaults are the
    published ones for words; `pygen train` begins with smaller ones for characters (`arguments_for`).

    Trained by truncated back-propagation through time: the loop gives it windows that follow each other in `batch_size`
    parallel streams, and the states at the end of one are where the next begins, without a gradient through them.

    Args:
        vocabulary: V different strings, whose places are the tokens; for words `<eos>`, the end of a line, and usually
            `<unk>` among them.
        level: "word" or "character".
        embedding_size: of a token's vector; with `tied` also of the last layer.
        hidden_size: of the other layers.
        num_layers: how many layers.
        chunk_size: how many neighbouring units share a master gate; divides the sizes of all layers.
        dropout, dropouti, dropouth, dropoute: of the last layer's output, of the embedded tokens, between layers, and
            of whole words.
        wdrop: DropConnect of the recurrent weights.
        alpha, beta: of the activation regularisation, and of the temporal one.
        tied: the embedding's weights are the softmax's as well.
        rnn: "onlstm", or "lstm" for nn.LSTM in the same place: what to compare with. `lstm_config` gives its size.

    Attributes:
        vocabulary: list of strings.
        level: as given.
        encoder, rnn, decoder: the layers; `state_dict` has the names of the published code.

    Shape:
        x: (B, T + 1), integers: windows, of which the first T tokens are read and the last T predicted.
        tokens: (T, B), int64.

    Raises:
        ValueError: a vocabulary with doubles, or an option out of its range.

    Example:
        >>> from pygen import data, models
        >>> from pygen.models.onlstm import ONLSTMLanguageModel
        >>> model = ONLSTMLanguageModel(list("abc "), "character", embedding_size=20, hidden_size=20, num_layers=2)
        >>> tokens = model.encode("a cab")
        >>> forget, written = model.eval().distances(tokens.unsqueeze(1))
        >>> forget.shape, model.decode(tokens)
        (torch.Size([2, 5, 1]), 'a cab')

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", ICLR 2019; the recipe: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", ICLR
    2018.
    """

    name = "onlstm"
    loss_unit = "nats per token"
    metric_names: Sequence[str] = ("perplexity",)
    pictures: Sequence[str] = ("curves", "distances")
    sequential = True
    train_defaults = {"learning_rate": 3e-3, "batch_size": 20, "weight_decay": 1.2e-6, "ema": 0.999, "clip": 0.25}
    asgd_defaults = {"learning_rate": 30.0, "clip": 0.25, "warmup_steps": 0, "final_learning_rate": 1.0}
    cannot = {
        "interpolate": "has nothing between two texts; it draws samples only",
        "reconstruct": "has no codes to reconstruct from; it draws samples only",
    }

    def __init__(
        self,
        vocabulary: Sequence[str],
        level: str = "word",
        *,
        embedding_size: int = 400,
        hidden_size: int = 1150,
        num_layers: int = 3,
        chunk_size: int = 10,
        dropout: float = 0.45,
        dropouti: float = 0.5,
        dropouth: float = 0.3,
        dropoute: float = 0.1,
        wdrop: float = 0.45,
        alpha: float = 2.0,
        beta: float = 1.0,
        tied: bool = True,
        rnn: str = "onlstm",
    ) -> None:
        config = arguments(locals())
        _check(config)
        super().__init__()
        self.config = config
        self._codec = codec = Vocabulary(vocabulary, level)
        self.vocabulary, self.level = codec.symbols, level
        self.shape, self.levels = (), len(codec)
        self.dropout, self.dropouti, self.dropoute = dropout, dropouti, dropoute
        self.alpha, self.beta = alpha, beta
        if level == "character":
            self.metric_names, self.loss_unit = ("bits_per_character", "perplexity"), "nats per character"
        if rnn == "lstm":
            self.pictures = ("curves",)  # it has no distances
        sizes = [embedding_size, *[hidden_size] * (num_layers - 1), embedding_size if tied else hidden_size]
        self.encoder = nn.Embedding(len(codec), embedding_size)
        self.rnn: nn.Module = (
            ONLSTMStack(sizes, chunk_size, dropout=dropouth, dropconnect=wdrop)
            if rnn == "onlstm"
            else LSTMStack(sizes, dropout=dropouth, dropconnect=wdrop)
        )
        self.decoder = nn.Linear(sizes[-1], len(codec))
        with torch.no_grad():
            self.decoder.weight.uniform_(-_FIRST_WEIGHT, _FIRST_WEIGHT)
            self.decoder.bias.zero_()
        if tied:
            self.encoder.weight = self.decoder.weight

    # Beginning

    @classmethod
    def arguments_for(cls, data: Dataset) -> dict[str, Any]:
        """The vocabulary and level of a text; by characters also smaller sizes and less regularisation.

        By characters: two layers of 256 units in chunks of 8, 128 for an embedding, weights not tied, and 0.1 for
        `dropout` and `dropouth`; the other terms are off.
        """
        if data.vocabulary is None or data.level is None:
            raise ValueError(f"onlstm learns from a text: give a .txt file or a folder with train.txt, got {data.name}")
        of_level = _OF_CHARACTERS if data.level == "character" else {}
        return {"vocabulary": list(data.vocabulary), "level": data.level} | of_level

    def check_data(self, data: Dataset) -> None:
        if data.vocabulary is None or list(data.vocabulary) != self.vocabulary or data.level != self.level:
            what = "no text" if data.vocabulary is None else f"{len(data.vocabulary)} {data.level}s"
            raise ValueError(
                f"{data.name} is not the text of this model's vocabulary: expected its {self.levels} {self.level}s, "
                f"got {what if data.levels != self.levels else 'others'}"
            )

    def lstm_config(self) -> dict[str, Any]:
        """The config of the same model with nn.LSTM, as wide as gives it (nearly) as many parameters.

        Raises:
            ValueError: one layer with tied weights, which has no size to change.

        Example:
            >>> from pygen.models.onlstm import ONLSTMLanguageModel
            >>> model = ONLSTMLanguageModel(list("abc"), "character", hidden_size=100, embedding_size=20)
            >>> model.lstm_config()["hidden_size"]
            103
        """
        return equal_lstm(type(self), self.config)

    # Training

    def forward(self, tokens: Tensor, states: Sequence[State] | None = None) -> LanguageModelOutput:
        """tokens (T, B), states before the first of them: zeros when left out."""
        embedded = self.encoder(tokens)
        if self.training and self.dropoute:
            # As if rows of the embedding were zero: a word is left out wherever it occurs.
            words = F.dropout(embedded.new_ones(len(self.vocabulary), 1), self.dropoute)
            embedded = embedded * F.embedding(tokens, words)
        found = self.rnn(locked_dropout(embedded, self.dropouti, self.training), states)
        output = locked_dropout(found.output, self.dropout, self.training)
        return LanguageModelOutput(self.decoder(output), found.states, found.distances, found.raw_outputs[-1], output)

    def loss(self, x: Tensor) -> Tensor:
        """L of windows x (B, T + 1), a scalar; in eval mode its first term.

        Each window begins with zero states, or, while `carried` is not None, with those after the window before.
        """
        if x.dim() != 2 or x.size(1) < 2 or x.is_floating_point():
            raise ValueError(f"onlstm: x must be integers (B, T + 1) with T >= 1, got {x.dtype} {tuple(x.shape)}")
        tokens = x.long().t().contiguous()
        found = self(tokens[:-1], self._carried_states(len(x)))
        if self.carried is not None:
            self.carried = [state.detach() for pair in found.states for state in pair]
        loss = F.cross_entropy(widen(found.logits.flatten(0, 1)), tokens[1:].flatten())
        if not self.training:
            return loss
        if self.alpha:
            loss = loss + self.alpha * widen(found.output).square().mean()
        if self.beta:
            loss = loss + self.beta * widen(found.raw_output).diff(dim=0).square().sum() / _changes(found.raw_output)
        return loss

    def _carried_states(self, batch: int) -> list[State] | None:
        """Of the first `batch` streams; None where they begin."""
        if not self.carried or len(self.carried[0]) < batch:
            return None
        rows = [state[:batch] for state in self.carried]
        return list(zip(rows[::2], rows[1::2], strict=True))

    def metrics_of_loss(self, loss: float) -> dict[str, float]:
        """exp(loss), and by characters loss / ln 2."""
        perplexity = math.exp(min(loss, math.log(torch.finfo(torch.float64).max) - 1)) if loss == loss else loss
        values = {"perplexity": perplexity, "bits_per_character": loss / math.log(2)}
        return {name: values[name] for name in self.metric_names}

    # Texts

    def encode(self, text: str) -> Tensor:
        """A text as tokens, int64 (T,). Words: by white space, with `<eos>` between lines.

        Raises:
            ValueError: symbols that are not in the vocabulary, unless it has `<unk>`.
        """
        return self._codec.encode(text)

    def decode(self, tokens: Tensor) -> str:
        """Tokens (T,) as text."""
        return self._codec.decode(tokens)

    @torch.no_grad()
    def distances(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the master gates say of tokens (T, B): 1 - mean(forget) and mean(input), each (L, T, B).

        A large distance: the units of many levels are written anew, as where a large constituent begins. Call `eval()`
        before.
        """
        if self.config["rnn"] != "onlstm":
            raise ValueError("an nn.LSTM has no master gates, and no distances; train with rnn=onlstm")
        forget, written = self(tokens.to(self.encoder.weight.device)).distances
        return forget, written

    @torch.no_grad()
    def sample(
        self,
        n: int,
        length: int = 400,
        *,
        temperature: float = 1.0,
        prompt: str = "",
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """n texts of the prompt and `length` tokens more. Call `eval()` before.

        Args:
            n: how many.
            length: tokens to draw: characters, or words.
            temperature: of the softmax; below 1: likelier texts; 0: always the likeliest token.
            prompt: what the texts begin with; without one they begin as behind a line break.
            generator: source of the draws, on the model's device.

        Raises:
            ValueError: a negative n, length or temperature, or a prompt with unknown symbols.
        """
        for name, value in (("n", n), ("length", length)):
            if value < 0:
                raise ValueError(f"sample: {name} must not be negative, got {value}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"sample: temperature must be a number >= 0, got {temperature}")
        device = self.encoder.weight.device
        prefix = self.encode(prompt)
        read = prefix if len(prefix) else torch.tensor([self._codec.numbers.get(self._line_break, 0)])
        tokens = read.to(device).unsqueeze(1).expand(-1, n)
        drawn, states = [prefix.to(device).unsqueeze(1).expand(-1, n)], None
        for _ in range(length):
            found = self(tokens, states)
            states, tokens = found.states, _draw(found.logits[-1], temperature, generator).unsqueeze(0)
            drawn.append(tokens)
        return [self.decode(text) for text in torch.cat(drawn).t().cpu()]

    @property
    def _line_break(self) -> str:
        return EOS if self.level == "word" else "\n"


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """logits (n, V) -> tokens (n,)."""
    if temperature == 0:
        return logits.argmax(1)
    p = (logits.double() / temperature).softmax(1)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def _changes(output: Tensor) -> int:
    """How many numbers the differences between steps of (T, B, H) are; 1 for a single step, which has none."""
    return max(1, output[1:].numel())


def _check(options: dict[str, Any]) -> None:
    check_choice("onlstm", "rnn", options["rnn"], RNNS)
    for name in ("embedding_size", "hidden_size", "num_layers", "chunk_size"):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"onlstm: {name} must be a whole number, at least 1, got {value!r}")
    for name in ("dropout", "dropouti", "dropouth", "dropoute", "wdrop"):
        if not 0 <= options[name] < 1:
            raise ValueError(f"onlstm: {name} must be in [0, 1), got {options[name]}")
    for name in ("alpha", "beta"):
        if not options[name] >= 0:
            raise ValueError(f"onlstm: {name} must not be negative, got {options[name]}")
