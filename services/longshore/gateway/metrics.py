"""Prometheus metrics of the gateway."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("longshore_gateway_requests_total", "HTTP requests", ["method", "route", "status"])
REQUEST_SECONDS = Histogram("longshore_gateway_request_seconds", "Time to the response's headers", ["route"])
JOBS_DRIVEN = Gauge("longshore_gateway_jobs_active", "Jobs that have not ended and are looked after here")
MOVES = Counter("longshore_gateway_job_moves_total", "State moves of jobs", ["state"])
EVENTS = Counter("longshore_gateway_events_total", "Events stored, by type", ["type"])
JOBS_WAITING = Gauge("longshore_gateway_jobs_waiting", "Queued jobs that have no place yet")
