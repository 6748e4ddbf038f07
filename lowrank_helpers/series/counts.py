"""What counts as a difference, in the whole series: written down before the evidence is recorded.

No number in this file ever changes because of a verdict. Shares are relative: of the mean of the two that are compared.
"""

# Two networks that differ in their seed alone make 150 ± 10 mistakes on 10,000 test images. Who chooses between two
# networks would not give up anything for less than a tenth of the mistakes.
MISTAKES = 0.10

# A mean cross-entropy is as noisy as the count of mistakes, and a tenth of it is as hard to notice.
LOSS = 0.10

# Seeds move the stable or entropy-based rank of a hidden layer by about 1 %. Twice that is more than luck.
RANK = 0.02

# Two timings of the same work on a busy machine differ by a few percent.
TIME = 0.10

# A test loss has turned and risen if it ends this much above its least value: as much as counts for a loss.
TURNED = LOSS

# A training set is known by heart if so many of its images are correct: one mistake in a thousand is a wrong label.
BY_HEART = 0.999

# A matrix counts as being of full rank if its numerical rank reaches this share of min(n, m).
FULL = 0.99

# A claim is settled if it holds in at least this share of the recorded runs, 19 of 20.
SETTLED = 0.95

# How often an interval holds the true mean difference.
CONFIDENCE = 0.95
