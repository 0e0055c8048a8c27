-- The steps that make balancesync's own schema, each taken once and in order.
-- Steps only add, so that the program of the version before still works.

-- name: step_1
CREATE TABLE {schema}.steps (
    step integer PRIMARY KEY,
    taken_at timestamptz NOT NULL DEFAULT now()
);

-- One row for each run. The id is a UUIDv7: it sorts by the time of the start.
CREATE TABLE {schema}.runs (
    id uuid PRIMARY KEY,
    job text NOT NULL,
    trigger text NOT NULL,
    mode text NOT NULL,
    status text NOT NULL,
    mapping text,
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    duration_s numeric(12, 3),
    attempts integer NOT NULL,
    mappings jsonb NOT NULL,
    warnings text[] NOT NULL,
    error text,
    redis_run_id text,
    -- A running run holds this advisory lock: a row without its lock was interrupted.
    lock_key bigint NOT NULL
);
CREATE INDEX runs_success ON {schema}.runs (id)
    WHERE status = 'succeeded' AND job = 'sync' AND mode = 'apply' AND mapping IS NULL;

-- What was skipped, and why. A key may be longer than an index can hold: its SHA-256 stands for it.
CREATE TABLE {schema}.rejects (
    mapping text NOT NULL,
    key_hash bytea NOT NULL,
    key bytea NOT NULL,
    value bytea,
    reason text NOT NULL,
    detail text NOT NULL,
    first_seen timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    healed_at timestamptz,
    run_id uuid NOT NULL,
    PRIMARY KEY (mapping, key_hash)
);
CREATE INDEX rejects_open ON {schema}.rejects (mapping, changed_at) WHERE healed_at IS NULL;

-- What each mapping looked like at the last success, and whether a refusal stands.
CREATE TABLE {schema}.baselines (
    mapping text PRIMARY KEY,
    present bigint,
    absent bigint,
    pruned bigint NOT NULL DEFAULT 0,
    refusal text,
    refused_at timestamptz
);
