# The daemon in an image of its own: docker build -t balancesync .

FROM python:3.13-slim AS build

WORKDIR /src
# The one tool that reads uv.lock; it stays behind in this stage.
RUN pip install --no-cache-dir "uv>=0.9,<1"
ENV UV_PROJECT_ENVIRONMENT=/opt/balancesync \
    UV_PYTHON=/usr/local/bin/python3 \
    UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy
# The dependencies change seldom: a layer of their own.
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-default-groups --no-install-project
COPY README.md LICENSE ./
COPY balancesync ./balancesync
RUN uv sync --frozen --no-default-groups --no-editable

FROM python:3.13-slim

LABEL org.opencontainers.image.title="balancesync" \
      org.opencontainers.image.description="Copies users' balances from Redis to PostgreSQL, exactly, and proves it" \
      org.opencontainers.image.licenses="MIT"

# Nothing that installs or builds stays in an image that only runs.
RUN pip uninstall --yes --root-user-action=ignore pip \
    && groupadd --system --gid 10001 balancesync \
    && useradd --system --uid 10001 --gid 10001 --home-dir /var/lib/balancesync --create-home \
       --shell /usr/sbin/nologin balancesync
COPY --from=build /opt/balancesync /opt/balancesync
ENV PATH=/opt/balancesync/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
WORKDIR /var/lib/balancesync
EXPOSE 8000

# Liveness alone: a database that is away must not get the container restarted. It asks where the
# daemon listens, by the same configuration.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; from balancesync.config import load; u.urlopen(f'http://127.0.0.1:{load().http.port}/livez', timeout=3)"]

ENTRYPOINT ["balancesync"]
CMD ["run"]
