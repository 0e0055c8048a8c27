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

-- name: step_2
-- Every change of a row, in the order of each key; `at` is one for all of a run or flush.
-- key has the canonical texts of the key columns; old and new map value columns to their texts.
CREATE TABLE {schema}.changes (
    mapping text COLLATE "C" NOT NULL,
    key text[] COLLATE "C" NOT NULL,
    at timestamptz NOT NULL,
    run_id uuid NOT NULL,
    op "char" NOT NULL,
    old jsonb,
    new jsonb
);
CREATE INDEX changes_key ON {schema}.changes (mapping, key, at);
-- Small, for many changes share their time: what is too old is found by it.
CREATE INDEX changes_at ON {schema}.changes (at);

-- Since when each mapping's changes are kept without a gap, and with which columns of which table.
CREATE TABLE {schema}.histories (
    mapping text PRIMARY KEY,
    shape text NOT NULL,
    since timestamptz NOT NULL
);

-- The newest step that the program of a run knew. Those before step 2 leave it empty: what their
-- runs changed is in no history.
ALTER TABLE {schema}.runs ADD COLUMN step integer;
ALTER TABLE {schema}.runs ADD COLUMN recorded_at timestamptz NOT NULL DEFAULT now();
-- Live mode adds a run a minute: what looks for the others must not walk over them.
CREATE INDEX runs_not_live ON {schema}.runs (id) WHERE job <> 'live';
CREATE INDEX runs_before_history ON {schema}.runs (recorded_at)
    WHERE step IS NULL AND mode = 'apply';

-- The keys that were pruned since the mapping's last success, each written down before it goes.
-- baselines.pruned is how many they are.
CREATE TABLE {schema}.pruned (
    mapping text COLLATE "C" NOT NULL,
    key text[] COLLATE "C" NOT NULL,
    run_id uuid NOT NULL,
    PRIMARY KEY (mapping, key)
);

-- name: step_3
-- Which Redis it was, and how often it had been emptied by FLUSHALL or FLUSHDB since its start.
ALTER TABLE {schema}.baselines ADD COLUMN redis_run_id text;
ALTER TABLE {schema}.baselines ADD COLUMN redis_flushes bigint;
-- Each flush of live mode that deletes asks for a mapping's last restore, among the runs of a year.
CREATE INDEX runs_restores ON {schema}.runs (recorded_at, id) WHERE job = 'restore' AND mode = 'apply';

-- name: step_4
-- What Redis said of itself at the last success, or at a later moment until which it certainly wasn't
-- empty; and on which Redis the refusal was met. With both goes what a program of step 3 would write
-- beside them: where that is another by now, they count no more.
ALTER TABLE {schema}.baselines ADD COLUMN redis_seen jsonb;
ALTER TABLE {schema}.baselines ADD COLUMN refused_on jsonb;

-- Published tables need a replica identity for each UPDATE and DELETE; this one has no key.
ALTER TABLE {schema}.changes REPLICA IDENTITY FULL;

-- What a table's rules and triggers (a digest of them) made of the values asked for: the row isn't
-- written again while both stay so. `key` as in `changes`, asked and stored as its old and new.
CREATE TABLE {schema}.altered (
    mapping text COLLATE "C" NOT NULL,
    key text[] COLLATE "C" NOT NULL,
    asked jsonb NOT NULL,
    stored jsonb NOT NULL,
    hooks text NOT NULL,
    run_id uuid NOT NULL,
    PRIMARY KEY (mapping, key)
);

-- Up to when live mode has brought over every change, by PostgreSQL's clock: one row, once it has.
CREATE TABLE {schema}.followed (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    until timestamptz NOT NULL
);
-- How many keys a verify found changing at every look, by mapping. Programs before leave it empty.
ALTER TABLE {schema}.runs ADD COLUMN moving jsonb;
CREATE INDEX runs_verifies ON {schema}.runs (id) WHERE job = 'verify' AND status = 'succeeded';

-- When the mapping's last success was, and what live mode has seen since: how many keys went and
-- haven't come back (NULL: it has written nothing), of how many of them it deleted the rows.
ALTER TABLE {schema}.baselines ADD COLUMN known_at timestamptz;
ALTER TABLE {schema}.baselines ADD COLUMN gone bigint;
ALTER TABLE {schema}.baselines ADD COLUMN deleted bigint NOT NULL DEFAULT 0;
-- What was seen of Redis since that success by which its keys may have been made again from zero.
ALTER TABLE {schema}.baselines ADD COLUMN doubt text;
ALTER TABLE {schema}.baselines ADD COLUMN doubted_at timestamptz;
