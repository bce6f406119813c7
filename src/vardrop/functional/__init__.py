"""Divergences, means, quantiles and moments of the family: tensors in, tensors out, float32 or better."""

from vardrop.functional.gaussian import ard_kl as ard_kl
from vardrop.functional.gaussian import ard_kl_from_log_alpha as ard_kl_from_log_alpha
from vardrop.functional.gaussian import gamma_ard_kl as gamma_ard_kl
from vardrop.functional.gaussian import log_alpha as log_alpha
from vardrop.functional.gaussian import log_uniform_kl as log_uniform_kl
from vardrop.functional.gaussian import log_uniform_kl_from_log_alpha as log_uniform_kl_from_log_alpha
from vardrop.functional.gaussian import normal_kl as normal_kl
from vardrop.functional.gaussian import vbd_kl as vbd_kl
from vardrop.functional.kumaraswamy import kumaraswamy_beta_kl as kumaraswamy_beta_kl
from vardrop.functional.kumaraswamy import kumaraswamy_icdf as kumaraswamy_icdf
from vardrop.functional.kumaraswamy import kumaraswamy_log_icdf as kumaraswamy_log_icdf
from vardrop.functional.kumaraswamy import kumaraswamy_logit_icdf as kumaraswamy_logit_icdf
from vardrop.functional.kumaraswamy import kumaraswamy_mean as kumaraswamy_mean
from vardrop.functional.moments import conv2d_moments as conv2d_moments
from vardrop.functional.moments import linear_moments as linear_moments
from vardrop.functional.student_t import student_t_kl as student_t_kl
from vardrop.functional.truncated_lognormal import truncated_lognormal_icdf as truncated_lognormal_icdf
from vardrop.functional.truncated_lognormal import truncated_lognormal_kl as truncated_lognormal_kl
from vardrop.functional.truncated_lognormal import truncated_lognormal_mean as truncated_lognormal_mean
from vardrop.functional.truncated_lognormal import truncated_lognormal_snr as truncated_lognormal_snr
