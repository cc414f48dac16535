"""OpenTelemetry traces of requests through the deployments; Serve makes the spans, and hands the trace along."""

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray.serve.schema import TracingConfig

from lorafleet.config import Logging


def tracing_config(settings: Logging) -> TracingConfig:
    """What Serve makes of the settings. It holds for a cluster from Serve's start on."""
    return TracingConfig(
        enabled=settings.traces != "none",
        # Where there is none, Serve writes files beside its logs.
        exporter_import_path="serve.traces:to_collector" if settings.traces == "otlp" else "",
        sampling_ratio=settings.traced_share,
    )


def to_collector(file_name: str) -> list[SpanProcessor]:
    """Spans go by OTLP to the collector that OpenTelemetry's own variables name, as OTEL_EXPORTER_OTLP_ENDPOINT.

    Args:
        file_name: Serve's proposal for a file, which nobody needs here.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter())]
