"""Measures of uncertainty and metrics against their definitions, by loops in float64."""

import math

import pytest
import torch

import vardrop as vd
from vardrop.errors import InvalidValueError, MissingExtraError

U, M = vd.uncertainty, vd.metrics


def log_probabilities(samples=7, n=6, classes=4, more=(), scale=2.0):
    generator = torch.Generator().manual_seed(samples + n)
    logits = scale * torch.randn(samples, n, classes, *more, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=2)


def entropy(probabilities):
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0.0)


def direct(draws):
    """Predictive entropy, expected entropy, and the variance of the class probabilities of one example."""
    classes = range(len(draws[0]))
    mean = [math.fsum(draw[c] for draw in draws) / len(draws) for c in classes]
    spread = [math.fsum((draw[c] - mean[c]) ** 2 for draw in draws) / len(draws) for c in classes]
    return entropy(mean), math.fsum(map(entropy, draws)) / len(draws), spread


@pytest.mark.parametrize("more", [(), (3,)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_entropies_and_variance_are_those_of_a_loop(more, dtype, tolerance):
    given = log_probabilities(more=more)
    probabilities = given.exp().movedim(2, -1).flatten(1, -2)  # (samples, labels, classes)
    found = [f(given.to(dtype)).double() for f in (U.predictive_entropy, U.expected_entropy, U.mutual_information)]
    assert all(each.shape == (6, *more) for each in found)
    spread = U.variance(given.to(dtype)).double().movedim(1, -1).flatten(0, -2)
    for index in range(probabilities.shape[1]):
        total, expected, variance = direct(probabilities[:, index].tolist())
        measured = [each.flatten()[index].item() for each in found]
        assert measured == pytest.approx([total, expected, total - expected], abs=tolerance)
        assert spread[index].tolist() == pytest.approx(variance, abs=tolerance)


def test_mutual_information_keeps_its_digits_where_the_draws_nearly_agree():
    logits = torch.zeros(2, 1, 10, dtype=torch.float64)
    logits[0, 0, 0], logits[1, 0, 0] = 1e-3, -1e-3
    exact = logits.log_softmax(dim=2)
    expected = U.predictive_entropy(exact) - U.expected_entropy(exact)
    assert 1e-8 < expected < 1e-7
    single = exact.float()
    torch.testing.assert_close(U.mutual_information(single).double(), expected, rtol=1e-2, atol=0.0)
    assert (U.predictive_entropy(single) - U.expected_entropy(single)).double().sub(expected).abs() > 0.5 * expected


def test_agreeing_draws_share_nothing_and_opposed_ones_all_they_can():
    one = log_probabilities(samples=1)
    assert U.mutual_information(one.expand(5, -1, -1)).abs().max() < 1e-15
    opposed = torch.eye(4).log()[:, None, :]
    assert U.mutual_information(opposed).item() == pytest.approx(math.log(4))
    assert U.expected_entropy(opposed).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extreme", [-math.inf, -1e4, -200.0])
def test_extremes_are_finite(dtype, extreme):
    sure = torch.tensor([[[0.0, extreme, extreme]], [[0.0, extreme, extreme]], [[extreme, 0.0, extreme]]], dtype=dtype)
    for measure in (U.predictive_entropy, U.expected_entropy, U.mutual_information, U.variance):
        assert measure(sure).isfinite().all() and (measure(sure) >= 0).all()
    assert U.mutual_information(sure).item() == pytest.approx(entropy([2 / 3, 1 / 3]), abs=1e-6)
    assert U.predictive_log_probabilities(sure)[0, 0].item() == pytest.approx(math.log(2 / 3))


def test_small_probabilities_are_not_lost_in_the_mean_of_logs():
    given = torch.tensor([[[0.0, -300.0]], [[0.0, -310.0]]])
    expected = -300.0 + math.log((1.0 + math.exp(-10.0)) / 2)
    assert U.predictive_log_probabilities(given)[0, 1].item() == pytest.approx(expected, rel=1e-6)


def test_the_total_variance_of_a_regression_is_that_of_draws_from_its_mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noise = 0.1 + torch.rand(5, 1, generator=generator, dtype=torch.float64)
    mean, variance = U.regression_moments(means, noise)
    count = 400_000
    chosen = torch.randint(5, (count,), generator=generator)
    y = means[chosen] + noise[chosen].sqrt() * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    assert ((y.mean(0) - mean) / (variance / count).sqrt()).abs().max() < 4.5
    squares = (y - mean).square()
    assert ((squares.mean(0) - variance) / (squares.var(0) / count).sqrt()).abs().max() < 4.5


def test_the_likelihood_of_a_regression_integrates_to_one_and_is_that_of_a_loop():
    means, noise = torch.tensor([[0.3], [-1.2], [2.0]]).double(), 0.4
    grid = torch.linspace(-12.0, 12.0, 20001, dtype=torch.float64)
    density = U.regression_log_likelihood(means.expand(3, len(grid)), noise, grid).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-10)
    moments = [torch.trapezoid(density * grid**power, grid).item() for power in (1, 2)]
    mean, variance = U.regression_moments(means, noise)
    assert moments == pytest.approx([mean.item(), variance.item() + mean.item() ** 2], abs=1e-9)
    far = U.regression_log_likelihood(means.float(), noise, torch.tensor([1e6]))
    assert far.isfinite().all()


@pytest.mark.parametrize("noise", [0.0, -1.0, math.inf, math.nan])
def test_a_noise_variance_that_is_none_is_refused(noise):
    with pytest.raises(InvalidValueError, match="noise_variance"):
        U.regression_moments(torch.zeros(2, 3), noise)


def test_what_is_no_log_probability_is_refused():
    with pytest.raises(InvalidValueError, match="logs of probabilities"):
        U.predictive_entropy(torch.full((2, 3, 4), 0.25))
    with pytest.raises(InvalidValueError, match="shape"):
        U.predictive_entropy(torch.full((3, 4), 0.25).log())
    with pytest.raises(InvalidValueError, match="logs of probabilities"):
        U.mutual_information(torch.full((2, 3, 4), math.nan))
    with pytest.raises(InvalidValueError, match=r"sum to 0\.25 over the classes: must sum to 1"):
        U.mutual_information(torch.full((2, 3, 4), 1 / 16).log())
    for wrong in (M.nll, M.brier):
        with pytest.raises(InvalidValueError, match="logs of probabilities"):
            wrong(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
        with pytest.raises(InvalidValueError, match="must sum to 1"):
            wrong(torch.tensor([[-3.0, -1.0]]), torch.tensor([0]))


def test_draws_of_a_regression_that_do_not_fit_are_refused():
    with pytest.raises(InvalidValueError, match="shape of a draw|that of a draw"):
        U.regression_log_likelihood(torch.zeros(2, 3), 1.0, torch.zeros(2))
    with pytest.raises(InvalidValueError, match=r"means have the shape \(0, 3\): must be .* at least one draw"):
        U.regression_moments(torch.zeros(0, 3), 1.0)
    with pytest.raises(InvalidValueError, match=r"noise_variance has the shape \(2,\): must be broadcastable"):
        U.regression_moments(torch.zeros(4, 3), torch.ones(2))


@pytest.mark.parametrize("more", [(), (3,)])
def test_judging_is_a_loop_over_labels(more):
    given = log_probabilities(more=more)
    y = torch.randint(4, (6, *more), generator=torch.Generator().manual_seed(1))
    found = M.judge(given, y)
    probabilities = given.exp().mean(0).movedim(1, -1).flatten(0, -2).tolist()
    for index, (mean, label) in enumerate(zip(probabilities, y.flatten().tolist(), strict=True)):
        assert found.confidence[index].item() == pytest.approx(max(mean))
        assert found.correct[index].item() is (mean.index(max(mean)) == label)
        assert found.nll[index].item() == pytest.approx(-math.log(mean[label]))
        expected = sum((p - (c == label)) ** 2 for c, p in enumerate(mean))
        assert found.brier[index].item() == pytest.approx(expected)
        assert found.entropy[index].item() == pytest.approx(entropy(mean))
    assert torch.equal(found.mutual_information, U.mutual_information(given).flatten())


def binned(confidence, correct, bins):
    """Count, mean confidence and accuracy of each bin, the last one closed on both sides."""
    rows = []
    for index in range(bins):
        inside = [
            (p, hit)
            for p, hit in zip(confidence, correct, strict=True)
            if index == min(bins - 1, next(k for k in range(bins, -1, -1) if p >= k / bins))
        ]
        rows.append((len(inside), *(math.fsum(column) / max(1, len(inside)) for column in zip(*inside, strict=True))))
    return [row if row[0] else (0, 0.0, 0.0) for row in rows]


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_calibration_error_is_the_gap_in_the_reliability_diagram(bins, dtype):
    generator = torch.Generator().manual_seed(2)
    confidence = torch.rand(400, generator=generator, dtype=dtype)
    confidence[:60] = 1.0
    correct = torch.rand(400, generator=generator, dtype=dtype) < confidence.square()
    correct[:9] = False
    rows = binned(confidence.tolist(), correct.tolist(), bins)
    found = M.reliability(confidence, correct, bins=bins)
    assert found.counts.tolist() == [row[0] for row in rows]
    assert found.confidence.tolist() == pytest.approx([row[1] for row in rows])
    assert found.accuracy.tolist() == pytest.approx([row[2] for row in rows])
    expected = sum(count * abs(mean - hits) for count, mean, hits in rows) / 400
    assert M.calibration_error(confidence, correct, bins=bins) == pytest.approx(expected, abs=1e-12)


def test_confidences_that_are_none_are_refused():
    for confidence in (torch.tensor([1.5]), torch.tensor([-0.1]), torch.tensor([math.nan])):
        for metric in (M.calibration_error, M.reliability):
            with pytest.raises(InvalidValueError, match="confidence"):
                metric(confidence, torch.tensor([True]))
    for bins in (0, 2.5):
        with pytest.raises(InvalidValueError, match=f"bins={bins}"):
            M.reliability(torch.tensor([0.5]), torch.tensor([True]), bins=bins)
    for metric in (M.calibration_error, M.reliability):
        with pytest.raises(InvalidValueError, match="0 confidences, 0 marks"):
            metric(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        with pytest.raises(InvalidValueError, match="1 confidences, 2 marks"):
            metric(torch.tensor([0.5]), torch.tensor([True, False]))
        with pytest.raises(InvalidValueError, match="true or false"):
            metric(torch.tensor([0.5]), torch.tensor([0.7]))


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-9, 0.0), (50.0, -20.0)])
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(scale, shift):
    generator = torch.Generator().manual_seed(3)
    inside = torch.randint(8, (40,), generator=generator) * scale + shift
    outside = (torch.randint(8, (30,), generator=generator) + 2) * scale + shift
    pairs = [(a, b) for a in inside.tolist() for b in outside.tolist()]
    expected = sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)
    assert M.ood_auroc(inside, outside) == pytest.approx(expected, abs=1e-6)
    assert M.ood_auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-6)


def test_equal_scores_tell_nothing_and_missing_ones_are_refused():
    assert M.ood_auroc(torch.ones(5), torch.ones(3)) == 0.5
    for inside, outside in ((torch.ones(0), torch.ones(3)), (torch.ones(3), torch.tensor([math.nan]))):
        with pytest.raises(InvalidValueError, match="scores"):
            M.ood_auroc(inside, outside)


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.classification", None)
    with pytest.raises(MissingExtraError, match=r"vardrop\[metrics\]"):
        M.calibration_error(torch.tensor([0.5]), torch.tensor([True]))
    with pytest.raises(MissingExtraError, match=r"vardrop\[metrics\]"):
        M.ood_auroc(torch.ones(5), torch.ones(3))


@pytest.mark.parametrize("measure", [vd.metrics.nll, vd.metrics.brier])
@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_refused(measure, label):
    with pytest.raises(InvalidValueError, match=f"label {label}: must lie in 0 to 2"):
        measure(torch.zeros(2, 3).log_softmax(dim=1), torch.tensor([0, label]))


@pytest.mark.parametrize("measure", [vd.metrics.nll, vd.metrics.brier])
def test_labels_are_whole_numbers_one_for_each_prediction(measure):
    told = torch.zeros(2, 3).log_softmax(dim=1)
    assert torch.equal(measure(told, torch.tensor([0, 1], dtype=torch.uint8)), measure(told, torch.tensor([0, 1])))
    with pytest.raises(InvalidValueError, match=r"labels of type torch.float32: must be whole numbers"):
        measure(told, torch.tensor([0.0, 1.0]))
    for wrong in (told[:1], told[0]):
        with pytest.raises(InvalidValueError, match=r"labels of shape \(2,\) for log-probabilities of shape"):
            measure(wrong, torch.tensor([0, 1]))
