"""What a relay counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

_JOB = ("project", "job", "site")

FORWARDED = Counter(
    "longshore_relay_forwarded_total", "Rollouts and notices handed in at home, by outcome", (*_JOB, "outcome")
)
TAKEN_IN = Counter("longshore_relay_taken_in_total", "Rollouts and notices taken from the site's broker", _JOB)
LEASED = Counter("longshore_relay_leased_total", "Tickets leased or adopted from home", _JOB)
LOST = Counter("longshore_relay_lost_total", "Tickets ended at the site because they are no longer ours", _JOB)
HELD = Gauge("longshore_relay_held_tickets", "Tickets under this site's lease", _JOB)
AT_SITE = Gauge("longshore_relay_site_tickets", "Tickets at the site's broker that have not ended there", _JOB)
SPOOL_RECORDS = Gauge("longshore_relay_spool_records", "Rollouts and notices that home has not covered yet", _JOB)
SPOOL_BYTES = Gauge("longshore_relay_spool_bytes", "Size of the spool's files", _JOB)
SPOOL_FULL = Gauge("longshore_relay_spool_full", "1 while the spool refuses rollouts, so that they wait", _JOB)
OLDEST = Gauge("longshore_relay_oldest_spooled_seconds", "Age of the oldest record not yet handed in at home", _JOB)
LINK_UP = Gauge("longshore_relay_link_up", "1 while the home broker answers", _JOB)
SITE_UP = Gauge("longshore_relay_site_up", "1 while the site's broker answers", _JOB)
WEIGHTS_LINK_UP = Gauge("longshore_relay_weights_link_up", "1 while the home weight store answers", _JOB)
WEIGHTS_FAULTS = Counter(
    "longshore_relay_weights_faults_total", "Versions that could not be taken over from home as they came", _JOB
)
CREDENTIAL_EXPIRES = Gauge(
    "longshore_relay_credential_expires_timestamp_seconds", "When the site's credential expires, Unix seconds", _JOB
)
