-- The history: what changed, and since when nothing is missing. {unbroken} tells of a row h of
-- histories whether no program that keeps none has written since, {of_others} whether it is another
-- mapping's of what this one writes, {same_shape} whether it is about the table and columns $2.

-- name: moment
SELECT clock_timestamp() AS now, greatest(clock_timestamp(), max(at) + interval '1 microsecond') AS at
FROM (SELECT max(at) AS at FROM {schema}.changes
      UNION ALL SELECT max(since) FROM {schema}.histories) AS last;

-- name: begin
WITH ended AS (
    DELETE FROM {schema}.histories AS h WHERE {of_others}
)
INSERT INTO {schema}.histories AS h (mapping, shape, since)
SELECT $1, $2, $5 WHERE NOT EXISTS (
    SELECT FROM {schema}.histories AS h WHERE h.mapping = $1 AND {same_shape} AND {unbroken})
ON CONFLICT (mapping) DO UPDATE SET shape = EXCLUDED.shape, since = EXCLUDED.since;

-- name: end
DELETE FROM {schema}.histories AS h WHERE h.mapping = $1 OR {of_others};

-- name: since
SELECT h.since FROM {schema}.histories AS h WHERE h.mapping = $1 AND {same_shape} AND {unbroken};

-- name: forget
WITH gone AS (
    DELETE FROM {schema}.changes
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM {schema}.changes WHERE at <= $1 ORDER BY at LIMIT $2))
    RETURNING 1
), moved AS (
    -- What is deleted is no longer known, whatever keep_days says later on.
    UPDATE {schema}.histories SET since = $1 WHERE since < $1 AND EXISTS (SELECT FROM gone)
)
SELECT count(*) FROM gone;

-- name: changes
SELECT at, run_id, op::text AS op, old::text AS old, new::text AS new
FROM {schema}.changes WHERE mapping = $1 AND key = $2 ORDER BY at DESC LIMIT $3;

-- name: one_as_of
-- In one statement, that is in one snapshot: a change that comes meanwhile is in both or neither.
SELECT c.op IS NOT NULL AS changed, c.old::text AS old, t.{key} IS NOT NULL AS there, {values}
FROM (VALUES (1)) AS always (n)
LEFT JOIN LATERAL (
    SELECT op, old FROM {schema}.changes WHERE mapping = $1 AND key = $2::text[] AND at > $3
    ORDER BY at LIMIT 1
) AS c ON true
LEFT JOIN {target} AS t ON {same_key};

-- name: all_as_of
WITH later AS MATERIALIZED (
    SELECT DISTINCT ON (key) key, old FROM {schema}.changes
    WHERE mapping = $1::text AND at > $2::timestamptz ORDER BY key, at
)
SELECT {t_columns} FROM {target} AS t
WHERE {keys_not_null} AND NOT EXISTS (SELECT FROM later WHERE later.key = {t_key_texts})
UNION ALL
SELECT {later_columns} FROM later WHERE old IS NOT NULL;
