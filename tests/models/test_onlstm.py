"""The ON-LSTM language model: its loss from scratch, states that are carried, samples, and the nn.LSTM beside it."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from pygen import training
from pygen.models import onlstm
from pygen.models.onlstm import ONLSTMLanguageModel

LETTERS = list("\n abcdefgh")
SMALL = {"embedding_size": 6, "hidden_size": 9, "num_layers": 3, "chunk_size": 3}
PLAIN = dict.fromkeys(("dropout", "dropouti", "dropouth", "dropoute", "wdrop", "alpha", "beta"), 0.0)


def new_model(seed=0, vocabulary=LETTERS, level="character", **options):
    torch.manual_seed(seed)
    model = ONLSTMLanguageModel(vocabulary, level, **(SMALL | options))
    with torch.no_grad():  # larger than at the beginning of a training, so that everything matters
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.double()


def tokens_of(*shape, seed=1):
    return torch.randint(0, len(LETTERS), shape, generator=torch.Generator().manual_seed(seed))


def step_by_step(model, tokens, states=None, chunk_size=3):
    """Logits, states and distances by the published cell's formulas and the names of its weights, of one sequence.

    Where nothing is dropped: DropConnect's weights are as many times smaller as entries would be left out.
    """
    weights = dict(model.named_parameters())
    kept_weights = 1 - model.config["wdrop"]
    layers = len(model.rnn.cells)
    states = states or [(0.0, 0.0)] * layers
    logits, distances = [], []
    for token in tokens.tolist():
        x, at_step = weights["encoder.weight"][token], []
        for layer in range(layers):
            h, c = states[layer]
            cell = f"rnn.cells.{layer}."
            hidden = weights[cell + "hh.weight"].size(1)
            h = h if torch.is_tensor(h) else torch.zeros(hidden, dtype=x.dtype)
            gates = weights[cell + "ih.0.weight"] @ x + weights[cell + "ih.0.bias"]
            gates = gates + kept_weights * weights[cell + "hh.weight"] @ h + weights[cell + "hh.bias"]
            n = hidden // chunk_size
            master_in = 1 - gates[:n].softmax(0).cumsum(0)
            master_forget = gates[n : 2 * n].softmax(0).cumsum(0)
            out, candidate, enter, forget = gates[2 * n :].view(4, hidden)
            wide_in, wide_forget = (m.repeat_interleave(chunk_size) for m in (master_in, master_forget))
            overlap = wide_in * wide_forget
            kept = forget.sigmoid() * overlap + wide_forget - overlap
            written = enter.sigmoid() * overlap + wide_in - overlap
            c = kept * c + written * candidate.tanh()
            x = out.sigmoid() * c.tanh()
            states = [*states[:layer], (x, c), *states[layer + 1 :]]
            at_step.append(torch.stack((1 - master_forget.mean(), master_in.mean())))
        logits.append(weights.get("decoder.weight", weights["encoder.weight"]) @ x + weights["decoder.bias"])
        distances.append(torch.stack(at_step, 1))
    return torch.stack(logits), states, torch.stack(distances, 2)


@pytest.mark.parametrize("tied", (True, False))
def test_the_loss_is_that_of_a_step_by_step_computation(tied):
    model, x = new_model(tied=tied).eval(), tokens_of(4, 8)
    expected = [F.cross_entropy(step_by_step(model, row[:-1])[0], row[1:]) for row in x]
    assert model.loss(x).item() == pytest.approx(sum(expected).item() / 4, rel=1e-12)
    assert model.loss(x.to(torch.uint8)).item() == model.loss(x).item()


def test_distances_are_those_of_every_layer_and_step():
    model, tokens = new_model().eval(), tokens_of(7, 2)
    forget, written = model.distances(tokens)
    for i in range(2):
        expected = step_by_step(model, tokens[:, i])[2]
        torch.testing.assert_close(torch.stack((forget, written))[..., i], expected, rtol=1e-12, atol=1e-12)


def test_training_adds_the_activation_terms_and_validation_does_not():
    model, x = new_model(**(PLAIN | {"alpha": 2.0, "beta": 3.0})), tokens_of(2, 6)
    output = model(x.t()[:-1]).output
    expected = 2 * output.square().mean() + 3 * (output[1:] - output[:-1]).square().mean()
    difference = model.train().loss(x) - model.eval().loss(x)
    torch.testing.assert_close(difference, expected, rtol=1e-12, atol=0)
    assert math.isfinite(model.train().loss(x[:, :2]).item()), "a window of one step has no changes"


def test_windows_with_carried_states_are_one_long_pass():
    model, text = new_model().eval(), tokens_of(1 + 5 * 7)
    windows = text.unfold(0, 8, 7)
    whole = F.cross_entropy(step_by_step(model, text[:-1])[0], text[1:]).item()
    assert training.evaluate(model, windows, streams=1) == pytest.approx(whole, rel=1e-12)
    alone = model.loss(windows).item()
    assert abs(alone - whole) > 1e-4, "without its past a window is another sequence"


@pytest.mark.parametrize("streams", (2, 3, 5, 9))
def test_streams_that_do_not_come_out_even_count_every_window_once(streams):
    model, text = new_model().eval(), tokens_of(1 + 7 * 4)
    windows, streams = text.unfold(0, 5, 4), min(streams, 7)
    long, total = 7 % streams, 0.0
    first = 0
    for i in range(streams):
        last = first + 7 // streams + (i < long)
        piece = text[4 * first : 4 * last + 1]
        total += F.cross_entropy(step_by_step(model, piece[:-1])[0], piece[1:], reduction="sum").item()
        first = last
    assert training.evaluate(model, windows, streams=streams) == pytest.approx(total / 28, rel=1e-12)


def test_a_loss_alone_has_no_memory_and_evaluation_leaves_none():
    model, x = new_model().eval(), tokens_of(2, 6)
    first = model.loss(x)
    assert torch.equal(model.loss(x), first) and model.carried is None
    model.carried = ()
    model.loss(x)
    carried = model.carried
    training.evaluate(model, tokens_of(5, 6))
    assert model.carried is carried and not torch.equal(model.loss(x), first)


def test_truncated_back_propagation_is_autograd_with_constant_states_between_windows():
    model, text = new_model(**PLAIN), tokens_of(1 + 2 * 5, 3)
    first, second = text[:6].t(), text[5:].t()
    model.carried = ()
    model.loss(first)
    model.zero_grad()
    model.loss(second).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for i in range(3):
        with torch.no_grad():
            states = step_by_step(model, first[i, :-1])[1]
        losses.append(F.cross_entropy(step_by_step(model, second[i, :-1], states)[0], second[i, 1:]))
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert found["encoder.weight"].abs().max() > 1e-3


def test_fewer_streams_go_on_with_the_first_states_and_more_begin_anew():
    model, x = new_model().eval(), tokens_of(3, 6)
    model.carried = ()
    model.loss(x)
    states = model.carried
    model.loss(x[:2])
    two = model.carried
    alone = copy.deepcopy(model)
    alone.carried = [state[:2] for state in states]
    alone.loss(x[:2])
    assert all(torch.equal(a, b) for a, b in zip(two, alone.carried, strict=True))
    model.carried = two
    torch.testing.assert_close(model.loss(x), new_model().eval().loss(x), rtol=1e-12, atol=0)


def test_tied_weights_are_one_parameter_and_the_last_layer_is_as_wide():
    model = new_model()
    assert model.decoder.weight is model.encoder.weight
    assert [cell.hh.weight.size(1) for cell in model.rnn.cells] == [9, 9, 6]
    again = copy.deepcopy(model)
    assert again.decoder.weight is again.encoder.weight, "the averaged model of a training is such a copy"
    untied = new_model(tied=False)
    assert untied.decoder.weight.shape == (10, 9) and untied.decoder.weight is not untied.encoder.weight


def test_the_state_dict_has_the_published_names():
    names = {"encoder.weight", "decoder.weight", "decoder.bias"}
    for i in range(3):
        names |= {f"rnn.cells.{i}.{name}" for name in ("ih.0.weight", "ih.0.bias", "hh.weight", "hh.bias")}
    model = new_model()
    assert set(model.state_dict()) == names
    other = new_model(seed=5)
    other.load_state_dict(model.state_dict())
    x = tokens_of(2, 6)
    assert torch.equal(other.eval().loss(x), model.eval().loss(x))


def test_the_published_sizes_have_the_published_number_of_parameters():
    """25 million on Penn Treebank's 10,000 words: table 1 of the paper."""
    with torch.device("meta"):
        model = ONLSTMLanguageModel([f"w{i}" for i in range(10_000)])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(25e6, rel=0.02)


def test_embedding_dropout_leaves_a_word_out_wherever_it_occurs():
    model = new_model(**(PLAIN | {"dropoute": 0.5})).train()
    seen = []
    model.rnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    tokens = tokens_of(40, 3)
    model(tokens)
    ratio = seen[0] / model.encoder(tokens).detach()
    for token in tokens.unique():
        factors = ratio[tokens == token]
        assert (factors - factors[0, 0]).abs().max() < 1e-12 and round(factors[0, 0].item(), 9) in (0.0, 2.0)
    assert (ratio == 0).any() and (ratio > 1).any()


def test_dropout_of_input_and_output_is_the_same_at_every_step():
    model = new_model(**(PLAIN | {"dropouti": 0.5, "dropout": 0.5})).train()
    seen = []
    model.rnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    tokens = tokens_of(20, 3)
    found = model(tokens)
    # The last chunk of a layer has an input gate of 0, so that nothing is ever written there.
    written = (found.output[..., :3], found.raw_output[..., :3])
    for dropped, before in ((seen[0], model.encoder(tokens)), written):
        mask = (dropped / before).detach()
        assert (mask - mask[0]).abs().max() < 1e-9 and {0, 2} == set(mask[0].round().flatten().tolist())
        assert not torch.equal(mask[0, 0].round(), mask[0, 1].round()), "every sequence has a mask of its own"


def test_encode_decode_and_unknown_symbols():
    model = new_model()
    assert model.decode(model.encode("a bad cab\n")) == "a bad cab\n" and model.vocabulary == LETTERS
    with pytest.raises(ValueError, match="not in the vocabulary of 10 characters: 'x'"):
        model.encode("fax")
    words = new_model(vocabulary=["<eos>", "the", "cat", "<unk>"], level="word")
    assert words.encode("the dog\nthe cat").tolist() == [1, 3, 0, 1, 2]
    assert words.decode(words.encode("the dog\nthe cat")) == "the <unk>\nthe cat"


def test_samples_are_the_same_for_the_same_seed():
    model = new_model().eval()

    def drawn(seed, **options):
        return model.sample(3, 30, generator=torch.Generator().manual_seed(seed), **options)

    assert drawn(0) == drawn(0) != drawn(1)
    assert [len(text) for text in drawn(0)] == [30] * 3 and len(set(drawn(0))) == 3
    assert all(text.startswith("a bad") and len(text) == 35 for text in drawn(0, prompt="a bad"))
    assert model.sample(0, 5) == [] and model.sample(1, 0, prompt="cab") == ["cab"]


def test_temperature_towards_0_always_takes_the_likeliest():
    model = new_model().eval()
    tokens = model.encode("a bad")
    for _ in range(12):
        tokens = torch.cat((tokens, step_by_step(model, tokens)[0][-1:].argmax(1)))
    greedy = model.sample(2, 12, temperature=0, prompt="a bad")
    assert greedy == [model.decode(tokens)] * 2
    assert model.sample(2, 12, temperature=1e-9, prompt="a bad") == greedy


def test_samples_have_the_frequencies_of_the_softmax():
    model = new_model().eval()
    texts = model.sample(4000, 1, temperature=0.7, prompt="a", generator=torch.Generator().manual_seed(0))
    p = (step_by_step(model, model.encode("a"))[0][-1] / 0.7).softmax(0)
    counts = torch.bincount(torch.tensor([model.encode(text)[1] for text in texts]), minlength=10)
    # Five standard deviations of a binomial.
    assert ((counts / 4000 - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_without_a_prompt_a_text_begins_as_behind_a_line_break():
    for model in (new_model().eval(), new_model(vocabulary=["a", "<eos>", "b"], level="word").eval()):
        start = model.encode("\n")
        expected = step_by_step(model, start)[0][-1].argmax()
        assert model.sample(1, 1, temperature=0) == [model.decode(expected.view(1))]


def test_an_lstm_in_the_same_place_is_nn_lstm():
    model, x = new_model(rnn="lstm", tied=False, **PLAIN), tokens_of(2, 6)
    layers = torch.nn.LSTM(6, 9, 3).double()
    state = {}
    for i, cell in enumerate(model.rnn.cells):
        state |= {name.replace("_l0", f"_l{i}"): value for name, value in cell.state_dict().items()}
    layers.load_state_dict(state | {})
    first = torch.nn.Embedding.from_pretrained(model.encoder.weight)
    hidden, _ = layers(first(x.t()[:-1]))
    expected = F.cross_entropy(model.decoder(hidden).flatten(0, 1), x.t()[1:].flatten())
    torch.testing.assert_close(model.loss(x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(training.evaluate(model.eval(), x, streams=2), expected.item(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="an nn.LSTM has no master gates, and no distances"):
        model.distances(x)


def test_an_lstm_has_dropconnect_too():
    model, x = new_model(rnn="lstm", **(PLAIN | {"wdrop": 0.5})), tokens_of(2, 6)
    torch.manual_seed(0)
    assert model.train().loss(x) != model.loss(x)
    assert torch.equal(model.eval().loss(x), model.loss(x))
    model.train().loss(x).backward()
    gradient = model.rnn.cells[0].weight_hh_l0.grad
    assert 0.3 < (gradient == 0).double().mean() < 0.7


@pytest.mark.parametrize("options", ({"hidden_size": 90}, {"hidden_size": 90, "tied": False, "num_layers": 1}))
def test_the_lstm_to_compare_with_has_as_many_parameters(options):
    model = new_model(**options)
    other = ONLSTMLanguageModel(**model.lstm_config())
    mine, its = (sum(p.numel() for p in m.parameters()) for m in (model, other))
    assert abs(mine - its) / mine < 0.01 and other.config["rnn"] == "lstm"
    with pytest.raises(ValueError, match="give num_layers=2 or tied=false"):
        new_model(num_layers=1).lstm_config()


def test_perplexity_and_bits_per_character_are_the_loss_in_other_units():
    model = new_model()
    assert model.metrics_of_loss(math.log(8)) == pytest.approx({"bits_per_character": 3.0, "perplexity": 8.0})
    words = new_model(vocabulary=["a", "<eos>"], level="word")
    assert words.metrics_of_loss(math.log(8)) == pytest.approx({"perplexity": 8.0})
    assert (
        math.isnan(words.metrics_of_loss(math.nan)["perplexity"]) and words.metrics_of_loss(1e9)["perplexity"] > 1e300
    )
    x = tokens_of(5, 6)
    measured = training.measure(model.eval(), x)
    assert measured["perplexity"] == pytest.approx(math.exp(training.evaluate(model, x)))


def test_trees_are_reached_through_the_model_s_module():
    assert onlstm.distances_to_tree([0.1, 0.9, 0.2], ["a", "b", "c"]).brackets()
    assert onlstm.unlabelled_f1


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"rnn": "gru"}, "rnn must be one of onlstm, lstm, got 'gru'"),
        ({"level": "byte"}, "level must be one of character, word, got 'byte'"),
        ({"hidden_size": 0}, "hidden_size must be a whole number, at least 1, got 0"),
        ({"num_layers": 1.5}, "num_layers must be a whole number"),
        ({"wdrop": 1.0}, r"wdrop must be in \[0, 1\), got 1.0"),
        ({"alpha": -1}, "alpha must not be negative, got -1"),
        ({"chunk_size": 4}, "chunk_size"),
        ({"vocabulary": ["a", "a"]}, "must be different symbols"),
    ),
)
def test_arguments_out_of_range_are_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        new_model(**options)


def test_windows_that_are_none_and_other_data_are_a_sentence():
    from pygen import data

    model = new_model()
    with pytest.raises(ValueError, match=r"x must be integers \(B, T \+ 1\) with T >= 1, got torch.int64 \(3, 1\)"):
        model.loss(tokens_of(3, 1))
    with pytest.raises(ValueError, match="got torch.float32"):
        model.loss(torch.zeros(3, 4))
    digits = data.Dataset(*[torch.zeros(2, 4, dtype=torch.uint8)] * 3, 10, (4,), "digits")
    with pytest.raises(ValueError, match="onlstm learns from a text: give a .txt file or a folder .*, got digits"):
        ONLSTMLanguageModel.arguments_for(digits)
    with pytest.raises(ValueError, match="digits is not the text of this model's vocabulary: expected its 10 char"):
        model.check_data(digits)
    for name, value in (("n", -1), ("length", -1), ("temperature", -1.0), ("temperature", math.nan)):
        with pytest.raises(ValueError, match=f"sample: {name} must"):
            model.sample(**({"n": 1} | {name: value}))
