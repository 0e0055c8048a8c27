-- balancesync's own tables: runs, rejects, baselines.

-- name: save_run
INSERT INTO {schema}.runs AS r (id, job, trigger, mode, status, mapping, started_at, finished_at,
    duration_s, attempts, mappings, warnings, error, redis_run_id, lock_key, step, moving)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::float8::numeric, $10, $11, $12, $13, $14, $15, $16, $17)
ON CONFLICT (id) DO UPDATE SET status = EXCLUDED.status, finished_at = EXCLUDED.finished_at,
    duration_s = EXCLUDED.duration_s, attempts = EXCLUDED.attempts, mappings = EXCLUDED.mappings,
    warnings = EXCLUDED.warnings, error = EXCLUDED.error, redis_run_id = EXCLUDED.redis_run_id,
    moving = EXCLUDED.moving;

-- name: mark_interrupted
UPDATE {schema}.runs AS r SET status = 'interrupted', finished_at = clock_timestamp(),
    error = 'the process ended in mid-run'
WHERE {abandoned};

-- name: runs
SELECT id, job, trigger, mode, CASE WHEN {abandoned} THEN 'interrupted' ELSE status END AS status,
    mapping, started_at, finished_at, duration_s::float8 AS duration_s, attempts, mappings::text AS mappings,
    warnings, error, redis_run_id, moving::text AS moving
FROM {schema}.runs AS r
WHERE ($1::uuid IS NULL OR id < $1) AND ($2::uuid IS NULL OR id = $2) AND ($4 OR job <> 'live')
    AND ($5::text IS NULL OR job = $5) AND ($6::text IS NULL OR $6 IN (trigger, split_part(trigger, ':', 1)))
ORDER BY id DESC LIMIT $3;

-- name: writer
SELECT r.job, r.trigger, r.started_at
FROM pg_locks AS w JOIN pg_locks AS l USING (pid, locktype, database, objsubid)
JOIN {schema}.runs AS r ON r.lock_key = (l.classid::bigint << 32) | l.objid::bigint
WHERE w.locktype = 'advisory' AND w.objsubid = 1 AND w.granted AND r.status = 'running'
    AND w.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (w.classid::bigint << 32) | w.objid::bigint = $1
LIMIT 1;

-- name: last_success
SELECT id, started_at, finished_at, redis_run_id FROM {schema}.runs
WHERE status = 'succeeded' AND job = 'sync' AND mode = 'apply' AND mapping IS NULL
ORDER BY id DESC LIMIT 1;

-- name: success_times
SELECT job, extract(epoch FROM max(finished_at))::float8 AS at FROM {schema}.runs
WHERE status = 'succeeded' AND mode <> 'dry_run' AND mapping IS NULL GROUP BY job;

-- name: drift
-- What the last verify of each mapping found to differ, unless a sync that began after it has
-- succeeded: that one has written it, or kept it as a reject.
WITH verifies AS (
    SELECT DISTINCT ON (m.key) m.key AS mapping, r.finished_at,
        (m.value->>'inserted')::bigint + (m.value->>'updated')::bigint + (m.value->>'deleted')::bigint AS rows
    FROM (
        SELECT id, finished_at, mappings FROM {schema}.runs
        WHERE job = 'verify' AND status = 'succeeded' ORDER BY id DESC LIMIT 100
    ) AS r, jsonb_each(r.mappings) AS m
    ORDER BY m.key, r.id DESC
)
SELECT v.mapping, CASE WHEN v.rows > 0 AND EXISTS (
        SELECT FROM {schema}.runs AS s
        WHERE s.status = 'succeeded' AND s.job = 'sync' AND s.mode = 'apply'
            AND (s.mapping IS NULL OR s.mapping = v.mapping) AND s.started_at >= v.finished_at)
    THEN 0 ELSE v.rows END AS rows
FROM verifies AS v;

-- name: save_followed
-- It doesn't wait for the disk: whatever it tells of was committed before, and the WAL is in order.
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO {schema}.followed (until) SELECT $1::timestamptz FROM quick
ON CONFLICT (one) DO UPDATE SET until = EXCLUDED.until
RETURNING clock_timestamp();

-- name: followed
SELECT until FROM {schema}.followed;

-- name: open_rejects
SELECT key, value, reason FROM {schema}.rejects
WHERE mapping = $1 AND healed_at IS NULL
    AND key_hash IN (SELECT sha256(k.key) FROM unnest($2::bytea[]) AS k (key));

-- name: last_redis
-- Of a run that followed it: one that only looked leaves the next one its warning.
SELECT redis_run_id FROM {schema}.runs WHERE redis_run_id IS NOT NULL AND mode = 'apply' AND id < $1
ORDER BY id DESC LIMIT 1;

-- name: last_restore
-- By PostgreSQL's clock: an id has that of the process, which may be of another host.
SELECT status FROM {schema}.runs
WHERE job = 'restore' AND mode = 'apply' AND (mapping IS NULL OR mapping = $1)
ORDER BY recorded_at DESC, id DESC LIMIT 1;

-- name: forget_runs
DELETE FROM {schema}.runs WHERE id IN (
    SELECT id FROM {schema}.runs WHERE started_at < now() - make_interval(days => $1) AND id <> $2
    ORDER BY id LIMIT 10000);

-- name: totals
SELECT job, mode, status, count(*) AS runs, coalesce(sum(duration_s), 0)::float8 AS seconds
FROM {schema}.runs GROUP BY job, mode, status;

-- name: durations
SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY duration_s::float8) AS p
FROM (SELECT duration_s FROM {schema}.runs WHERE status = 'succeeded' AND job = 'sync' AND mode = 'apply'
      ORDER BY id DESC LIMIT 100) AS r;

-- name: count_rejects
SELECT mapping, reason, count(*) AS rejects FROM {schema}.rejects WHERE healed_at IS NULL
GROUP BY mapping, reason ORDER BY mapping, reason;

-- name: rejects
SELECT mapping, key, value, reason, detail, first_seen, changed_at, healed_at, run_id
FROM {schema}.rejects
WHERE ($1::text IS NULL OR mapping = $1) AND ($2::text IS NULL OR reason = $2)
    AND ($3 OR healed_at IS NULL)
ORDER BY healed_at IS NOT NULL, changed_at DESC, mapping, key_hash LIMIT $4;

-- name: merge_rejects
-- Looked up one by one, by the primary key alone (so not with `healed_at IS NULL`, which has an index
-- of its own): to a planner that knows of no rows, any other join would do as well.
WITH latest AS (
    SELECT DISTINCT ON (mapping, key) mapping, sha256(key) AS key_hash, key, value, reason, detail
    FROM pg_temp.staged_rejects ORDER BY mapping, key, ctid DESC
)
INSERT INTO {schema}.rejects AS r
    (mapping, key_hash, key, value, reason, detail, first_seen, changed_at, run_id)
SELECT mapping, key_hash, key, value, reason, detail, $1::timestamptz, $1::timestamptz, $2::uuid
FROM latest AS l
WHERE NOT EXISTS (
    SELECT FROM {schema}.rejects AS o
    WHERE o.mapping = l.mapping AND o.key_hash = l.key_hash
        AND coalesce(o.healed_at, 'infinity') = 'infinity'
        AND o.reason = l.reason AND o.value IS NOT DISTINCT FROM l.value AND o.detail = l.detail
    OFFSET 0)
ON CONFLICT (mapping, key_hash) DO UPDATE SET value = EXCLUDED.value, reason = EXCLUDED.reason,
    detail = EXCLUDED.detail, changed_at = EXCLUDED.changed_at, run_id = EXCLUDED.run_id,
    first_seen = CASE WHEN r.healed_at IS NULL THEN r.first_seen ELSE EXCLUDED.first_seen END,
    healed_at = NULL;

-- name: heal_rejects
UPDATE {schema}.rejects AS r SET healed_at = $1::timestamptz
WHERE (r.mapping = ANY($2::text[]) OR r.mapping <> ALL($3::text[])) AND r.healed_at IS NULL
    AND NOT EXISTS (
    SELECT FROM pg_temp.staged_rejects AS s
    WHERE s.mapping = r.mapping AND sha256(s.key) = r.key_hash);

-- name: mappings_with_rejects
SELECT m.mapping FROM unnest($1::text[]) AS m (mapping)
WHERE EXISTS (SELECT FROM {schema}.rejects AS r WHERE r.mapping = m.mapping AND r.healed_at IS NULL);

-- name: heal_keys
-- By the primary key, too.
UPDATE {schema}.rejects AS r SET healed_at = $1::timestamptz
WHERE r.mapping = $2 AND coalesce(r.healed_at, 'infinity') = 'infinity' AND r.key_hash = ANY (ARRAY(
    SELECT sha256(k.key) FROM unnest($3::bytea[]) AS k (key)
    WHERE NOT EXISTS (
        SELECT FROM pg_temp.staged_rejects AS s
        WHERE s.mapping = $2 AND sha256(s.key) = sha256(k.key) OFFSET 0)));

-- name: empty_rejects
DELETE FROM pg_temp.staged_rejects;

-- name: vacuum_rejects
VACUUM pg_temp.staged_rejects;

-- name: forget_rejects
DELETE FROM {schema}.rejects WHERE (mapping, key_hash) IN (
    SELECT mapping, key_hash FROM {schema}.rejects
    WHERE healed_at < now() - make_interval(days => $1) LIMIT 10000);

-- name: baselines
-- A success of a program of before step 4 left what these columns tell as it was: it's no more true.
SELECT mapping, present, absent, pruned, refusal, refused_at, redis_run_id, redis_flushes,
    CASE WHEN redis_seen ->> 'run_id' IS NOT DISTINCT FROM redis_run_id
        AND (redis_seen ->> 'flushes')::bigint IS NOT DISTINCT FROM redis_flushes
    THEN redis_seen -> 'seen' END::text AS seen,
    CASE WHEN refused_on ->> 'refusal' = refusal AND (refused_on ->> 'at')::timestamptz = refused_at
    THEN refused_on -> 'places' END::text AS places,
    CASE WHEN known_at >= s.at THEN known_at END AS known_at,
    CASE WHEN known_at >= s.at THEN gone END AS gone,
    CASE WHEN known_at >= s.at THEN deleted ELSE 0 END AS deleted,
    CASE WHEN doubted_at >= s.at THEN doubt END AS doubt
FROM {schema}.baselines, (
    SELECT coalesce(max(recorded_at), '-infinity') AS at FROM (
        SELECT recorded_at FROM {schema}.runs
        WHERE status = 'succeeded' AND job = 'sync' AND mode = 'apply' AND mapping IS NULL
        ORDER BY id DESC LIMIT 1) AS r) AS s;

-- name: moment
-- The count of transactions never goes back, as a clock may; asking so makes this one count.
SELECT txid_current() AS moment, extract(epoch FROM clock_timestamp())::float8 AS at;

-- name: save_baseline
INSERT INTO {schema}.baselines AS b (mapping, present, absent, redis_run_id, redis_flushes, redis_seen, known_at)
VALUES ($1, $2, $3, $4, $5, jsonb_build_object('run_id', $4::text, 'flushes', $5::bigint, 'seen', $6::jsonb), $7)
ON CONFLICT (mapping) DO UPDATE SET present = EXCLUDED.present, absent = EXCLUDED.absent,
    redis_run_id = EXCLUDED.redis_run_id, redis_flushes = EXCLUDED.redis_flushes,
    redis_seen = EXCLUDED.redis_seen, pruned = 0, refusal = NULL, refused_at = NULL, refused_on = NULL,
    known_at = EXCLUDED.known_at, gone = NULL, deleted = 0, doubt = NULL, doubted_at = NULL;

-- name: save_seen
-- A run of one mapping, or a big hash that live mode read as a whole: those that are there are known.
UPDATE {schema}.baselines SET present = greatest(present, $2), absent = least(absent, $3)
WHERE mapping = $1 AND (present < $2 OR absent > $3);

-- name: save_gone
UPDATE {schema}.baselines SET gone = $2, deleted = $3 WHERE mapping = $1;

-- name: save_doubt
UPDATE {schema}.baselines SET doubt = $2, doubted_at = clock_timestamp()
WHERE mapping = $1 AND present IS NOT NULL;

-- name: save_refusal
-- $2: the reason, NULL if the one that is there is kept.
INSERT INTO {schema}.baselines AS b (mapping, refusal, refused_at) VALUES ($1, $2, clock_timestamp())
ON CONFLICT (mapping) DO UPDATE SET refusal = coalesce(EXCLUDED.refusal, b.refusal),
    refused_at = coalesce(b.refused_at, EXCLUDED.refused_at);

-- name: save_places
UPDATE {schema}.baselines SET refused_on = jsonb_build_object('refusal', refusal, 'at', refused_at,
    'places', $2::jsonb)
WHERE mapping = $1 AND refusal IS NOT NULL;

-- name: lift_refusals
UPDATE {schema}.baselines SET refusal = NULL, refused_at = NULL, refused_on = NULL
WHERE mapping = ANY($1::text[]) AND refusal IS NOT NULL;

-- name: lift_refusals_but
UPDATE {schema}.baselines SET refusal = NULL, refused_at = NULL, refused_on = NULL
WHERE mapping <> ALL($1::text[]) AND refusal IS NOT NULL;

-- name: remember_restored
-- Keys that were absent at the last success are known from now on, too.
UPDATE {schema}.baselines SET present = greatest(present, $2),
    absent = greatest(absent - greatest($2 - present, 0), 0), pruned = 0,
    redis_run_id = $3, redis_flushes = $4,
    redis_seen = jsonb_build_object('run_id', $3::text, 'flushes', $4::bigint, 'seen', $5::jsonb), doubt = NULL, doubted_at = NULL
WHERE mapping = $1 AND present IS NOT NULL;

-- name: renew
UPDATE {schema}.baselines SET redis_run_id = $2, redis_flushes = $3,
    redis_seen = jsonb_build_object('run_id', $2::text, 'flushes', $3::bigint, 'seen', $4::jsonb)
WHERE mapping = $1 AND redis_seen -> 'seen' = $5::jsonb;

-- name: forget_pruned
DELETE FROM {schema}.pruned WHERE mapping = $1;

-- name: record_pruned
-- $3: the texts of the keys' columns one after the other, $4 of them for each key.
WITH added AS (
    INSERT INTO {schema}.pruned (mapping, key, run_id)
    SELECT $1, array_agg(text ORDER BY place), $2
    FROM unnest($3::text[]) WITH ORDINALITY AS texts (text, place) GROUP BY (place - 1) / $4::int
    ON CONFLICT DO NOTHING
    RETURNING 1
)
UPDATE {schema}.baselines SET pruned = pruned + (SELECT count(*) FROM added) WHERE mapping = $1;

-- name: pruned
-- Looked up one by one, by the primary key, whatever the planner believes of the table.
SELECT w.key FROM (
    SELECT array_agg(text ORDER BY place) AS key
    FROM unnest($2::text[]) WITH ORDINALITY AS texts (text, place) GROUP BY (place - 1) / $3::int
) AS w
WHERE EXISTS (SELECT FROM {schema}.pruned AS p WHERE p.mapping = $1 AND p.key = w.key OFFSET 0);

-- name: withdraw_pruned
WITH gone AS (
    DELETE FROM {schema}.pruned WHERE ctid = ANY (ARRAY(
        SELECT (SELECT p.ctid FROM {schema}.pruned AS p WHERE p.mapping = $1 AND p.key = w.key)
        FROM (
            SELECT array_agg(text ORDER BY place) AS key
            FROM unnest($2::text[]) WITH ORDINALITY AS texts (text, place)
            GROUP BY (place - 1) / $3::int
        ) AS w))
    RETURNING 1
)
UPDATE {schema}.baselines SET pruned = pruned - (SELECT count(*) FROM gone) WHERE mapping = $1;
