"""A pull towards a reference policy, token by token, beside any objective."""

from __future__ import annotations

from torch import Tensor

from longshore.config_objective import KlSpec
from longshore.learner.objectives.tokens import TokenBatch, ratio_of


def kl_term(tokens: TokenBatch, reference: Tensor, spec: KlSpec) -> Tensor:
    """[N] coefficient * estimate of KL(pi || ref) at each token, with q = ref / pi:

        k1 = -log q     k2 = 1/2 (log q)^2     k3 = q - 1 - log q

    (Schulman, "Approximating KL divergence", 2020; k3 as GRPO has it, arXiv 2402.03300, eq. 4). `unbiased` multiplies
    by r_t, gradient included: then the expectation over mu is that over pi, and so is the gradient (DeepSeek-V3.2,
    arXiv 2512.02556). Without it, of k1 only noise would be left, and of k3 a gradient that is right for
    pi near mu and near the reference alone; that of k2 is right wherever pi = mu.

    Args:
        tokens: see TokenBatch.
        reference: [N] log-probs under the reference policy, without gradients.
        spec: which estimate, and how strong.
    """
    log_q = reference - tokens.logp
    if spec.estimator == "k1":
        estimate = -log_q
    elif spec.estimator == "k2":
        estimate = 0.5 * log_q.square()
    else:
        estimate = ratio_of(log_q) - 1.0 - log_q
    if spec.unbiased:
        estimate = estimate * ratio_of(tokens.log_ratio)
    return spec.coefficient * estimate
