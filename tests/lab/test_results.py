"""The figures of the table, on curves made by hand."""

import numpy as np

from jaxnorm.lab import results


def curves(name, accuracy, final_loss=None, test=None, rates=(0.1, 1.0)):
    """`accuracy` has axes (rates, seeds, samples)."""
    accuracy = np.asarray(accuracy, float)
    loss = np.zeros(accuracy.shape[:2]) if final_loss is None else np.asarray(final_loss)
    return results.Curves(
        network="mlp",
        normalization=name,
        learning_rates=rates,
        steps=tuple(range(0, 10 * accuracy.shape[2], 10)),
        train_loss=accuracy[:, :, 1:],
        final_loss=loss,
        validation_accuracy=accuracy,
        test_accuracy=accuracy[:, :, -1] if test is None else np.asarray(test),
    )


SLOW = curves("none", [[[0.1, 0.2, 0.8], [0.1, 0.4, 0.8]], [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]])
FAST = curves(
    "batch",
    [[[0.1, 0.7, 0.9], [0.1, 0.7, 1.0]], [[0.1, 0.9, 0.9], [0.1, 0.9, 0.8]]],
    test=[[0.9, 1.0], [0.0, 0.0]],
)


def test_the_table_of_two():
    slow, fast, absent = results.summarize_curves([SLOW, FAST], ("none", "batch", "instance"))
    # The best of all ends with 0.95, so that 0.855 counts as reached.
    np.testing.assert_allclose(fast.target, 0.855)
    assert (slow.steps_to_target, slow.fastest_rate) == (None, None)
    assert (fast.steps_to_target, fast.fastest_rate) == (10, 1.0)  # not the best rate, but first
    assert (fast.best_rate, fast.accuracy_mean) == (0.1, 0.95)
    np.testing.assert_allclose(fast.accuracy_deviation, 0.05)
    assert (slow.stable_rate, slow.stable_is_largest) == (0.1, False)
    # 0.9 of 0.95 is 0.855: one seed of the larger rate ends with 0.8.
    assert (fast.stable_rate, fast.stable_is_largest) == (0.1, False)
    assert not absent.applicable


def test_of_equal_rates_the_lowest_is_best():
    assert curves("none", [[[0.1, 0.9]], [[0.2, 0.9]]]).best == 0


def test_the_best_rate_is_best_over_the_last_quarter():
    steady, jumping = [0.1] * 6 + [0.9, 0.9], [0.1] * 6 + [0.5, 1.0]
    assert curves("none", [[jumping], [steady]]).best == 1


def test_steps_are_those_of_the_first_sample_that_reaches():
    accuracy = np.array([0.1, 0.9, 0.5, 0.9])
    assert results.steps_to_reach([0, 5, 10, 15], accuracy, 0.9) == 5
    assert results.steps_to_reach([0, 5, 10, 15], accuracy, 0.91) is None


def test_stable_needs_every_seed_a_finite_loss_and_something_learned():
    rates = [0.1, 1.0, 10.0]
    accuracy = np.array([[0.9, 0.9], [0.9, 0.82], [0.9, 0.9]])
    loss = np.zeros((3, 2))
    assert results.highest_stable(rates, loss, accuracy, least=0.5) == 10.0
    loss[2, 1] = np.inf
    assert results.highest_stable(rates, loss, accuracy, least=0.5) == 1.0
    accuracy[1, 1] = 0.8  # below 0.81
    assert results.highest_stable(rates, loss, accuracy, least=0.5) == 0.1
    assert results.highest_stable(rates, loss, accuracy, least=0.95) is None
    assert results.highest_stable(rates, np.full((3, 2), np.nan), accuracy, least=0.5) is None


def test_a_summary_of_the_largest_rate_says_so():
    [row] = results.summarize_curves([curves("batch", [[[0.1, 0.8]], [[0.1, 0.9]]])], ("batch",))
    assert (row.stable_rate, row.stable_is_largest) == (1.0, True)
