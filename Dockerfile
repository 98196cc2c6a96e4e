# Build: docker build -t kalamdb .
# Run:   docker run -p 127.0.0.1:8080:8080 -v kalamdb:/var/lib/kalamdb -e KALAMDB_JWT_SECRET -e KALAMDB_ROOT_PASSWORD kalamdb
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m venv /opt/kalamdb && /opt/kalamdb/bin/pip install --no-cache-dir ".[otel]"

FROM python:3.12-slim
RUN useradd --system --uid 10001 --home-dir /var/lib/kalamdb --create-home --shell /usr/sbin/nologin kalamdb
COPY --from=build /opt/kalamdb /opt/kalamdb
USER kalamdb
ENV KALAMDB_DATA_DIR=/var/lib/kalamdb/data KALAMDB_SERVER_HOST=0.0.0.0 PYTHONUNBUFFERED=1
VOLUME /var/lib/kalamdb
EXPOSE 8080
# Longer than shutdown.requests_s + shutdown.timeout_s: docker stop -t 60, or stop_grace_period of compose.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["/opt/kalamdb/bin/python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["/opt/kalamdb/bin/kalamdb"]
CMD ["serve"]
