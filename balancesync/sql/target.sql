-- What a run does to a target table. k1.. are the key columns, v1.. the value columns, o1.. the
-- values that the row had before; ctid in a table that only COPY fills is the order of reading.

-- name: create_rejects
CREATE TEMP TABLE pg_temp.staged_rejects
    (mapping text NOT NULL, key bytea NOT NULL, value bytea, reason text NOT NULL, detail text NOT NULL);
-- A key may be longer than an index can hold.
CREATE INDEX staged_rejects_key ON pg_temp.staged_rejects (mapping, sha256(key));

-- name: create
CREATE TEMP TABLE {staging} ({key_types}, {value_types}, rejected boolean);
CREATE TEMP TABLE {diff} (n bigint NOT NULL, op "char" NOT NULL, {key_types}, {value_types}, {old_types});

-- name: count_keys
SELECT {count_keys} FROM {staging};

-- name: drop_earlier
WITH last AS (
    SELECT DISTINCT ON ({keys}) {keys}, ctid AS place, rejected
    FROM {staging} ORDER BY {keys}, ctid DESC
), dropped AS (
    DELETE FROM {staging} AS earlier USING last
    WHERE {earlier_is_last} AND earlier.ctid <> last.place
    RETURNING earlier.rejected AS was_rejected, last.rejected AS is_rejected, {last_keys}
)
SELECT DISTINCT {key_texts} FROM dropped WHERE was_rejected AND is_rejected IS NULL;

-- name: withdraw_rejects
DELETE FROM pg_temp.staged_rejects AS s USING unnest($2::bytea[]) AS w (key)
WHERE s.mapping = $1 AND sha256(s.key) = sha256(w.key);

-- name: count_rejects
SELECT count(DISTINCT key) FROM pg_temp.staged_rejects WHERE mapping = $1;

-- name: count_staged
SELECT count(*) FROM {staging} WHERE rejected IS NULL;

-- name: count_target
SELECT count(*) FROM {target} AS t WHERE {keys_not_null};

-- name: count_written
SELECT count(*) FROM {target} AS t WHERE {t_synced_at} > $1 AND {keys_not_null};

-- name: count_written_lost
SELECT count(*) FROM {target} AS t WHERE {t_synced_at} > $1 AND {keys_not_null}
    AND NOT EXISTS (SELECT FROM {staging} AS s WHERE {same_key});

-- name: count_standing
-- Rows written at the moments $1, by earlier attempts, that hold what was read and aren't in the diff.
SELECT count(*) FROM {staging} AS s JOIN {target} AS t ON {same_key}
WHERE s.rejected IS NULL AND {t_synced_at} = ANY($1::timestamptz[])
    AND NOT EXISTS (SELECT FROM {diff} AS f WHERE f.op = 'u' AND {same_in_first});

-- name: staged_keys
SELECT {key_texts} FROM {staging} LIMIT $1;

-- name: count_pruned_back
SELECT count(*) FROM {pruned} AS p
WHERE p.mapping = $1 AND EXISTS (SELECT FROM {staging} AS s WHERE {s_key_texts} = p.key);

-- name: count_rejected_rows
SELECT count(*) FROM {staging} AS s WHERE s.rejected AND EXISTS (SELECT FROM {target} AS t WHERE {same_key});

-- name: is_in_key_order
SELECT abs(s.correlation) > 0.9 FROM pg_stats AS s
    JOIN pg_class AS c ON s.tablename = c.relname
    JOIN pg_namespace AS n ON n.oid = c.relnamespace AND s.schemaname = n.nspname
WHERE c.oid = {oid} AND s.attname = {first_key} AND NOT s.inherited;

-- name: diff_join
INSERT INTO {diff} (n, op, {keys}, {values}, {olds})
SELECT row_number() OVER (ORDER BY {keys}), op, {keys}, {values}, {olds}
FROM (
    SELECT CASE WHEN {no_row} THEN 'i'::"char" ELSE 'u'::"char" END AS op, {s_keys}, {s_values}, {t_values_as_olds}
    FROM {staged} AS s LEFT JOIN {target} AS t ON {same_key}
    WHERE s.rejected IS NULL AND ({no_row} OR {differs})
) AS d;

-- name: diff_new
INSERT INTO {diff} (n, op, {keys}, {values})
SELECT row_number() OVER (ORDER BY {keys}), 'i', {keys}, {values}
FROM {staging} WHERE rejected IS NULL;

-- name: diff_gone
INSERT INTO {diff} (n, op, {keys}, {olds})
SELECT $1 + row_number() OVER (ORDER BY {t_keys}), 'd', {t_keys}, {t_values}
FROM {target} AS t
WHERE t.{synced_at} IS NOT NULL AND {keys_not_null}
    AND NOT EXISTS (SELECT FROM {staging} AS s WHERE {same_key});

-- name: diff_gone_again
INSERT INTO {diff} (n, op, {keys}, {olds})
SELECT $1 + row_number() OVER (ORDER BY s.n), 'd', {t_keys}, {t_values}
FROM {first} AS s JOIN {target} AS t ON {same_key} WHERE s.op = 'd';

-- name: slices
-- The rows $1 < n <= $2, cut where n is a multiple of $3.
SELECT op::text AS op, min(n) - 1 AS after, max(n) AS last, count(*) AS rows
FROM {diff} WHERE n > $1 AND n <= $2 GROUP BY op, (n - 1) / $3 ORDER BY min(n);

-- name: skip_altered
-- Rows that hold what the table's rules and triggers ($2) once made of the very values asked for.
DELETE FROM {diff} AS s USING {altered} AS a
WHERE s.op = 'u' AND a.mapping = $1 AND a.hooks = $2 AND a.key = {s_key_texts}
    AND a.asked = {asked_json} AND a.stored = {old_json};

-- name: has_altered
SELECT EXISTS (SELECT FROM {altered} WHERE mapping = $1);

-- name: forget_altered
DELETE FROM {altered} AS a WHERE a.mapping = $1 AND NOT (a.hooks = $2 AND EXISTS (
    SELECT FROM {target} AS t WHERE {same_key_as_text} AND {t_json} = a.stored));

-- name: totals
SELECT {totals} FROM {diff} WHERE op = ANY($1::"char"[]);

-- name: index_diff
CREATE INDEX ON {diff} (n);

-- name: page
SELECT n, op::text AS op, {key_texts} FROM {diff} WHERE n > $1 AND op = $3::"char" ORDER BY n LIMIT $2;

-- name: page_with_values
SELECT n, {key_texts}, {raw_texts} FROM {diff} WHERE n > $1 AND op = $3::"char" ORDER BY n LIMIT $2;

-- name: count_moving
SELECT count(*) FROM {diff} AS s JOIN {first} AS f ON {same_in_first} WHERE {has_moved};

-- name: drop_moving
WITH moving AS (
    SELECT s.n FROM {diff} AS s JOIN {first} AS f ON {same_in_first} WHERE {has_moved}
), dropped AS (
    DELETE FROM {diff} AS d USING moving AS m WHERE d.n = m.n RETURNING d.op
)
SELECT op::text AS op, count(*) AS rows FROM dropped GROUP BY op;

-- name: sample
SELECT op::text AS op, {key_texts}, {value_texts}, {old_texts}
FROM {diff} WHERE op = $1::"char" ORDER BY n LIMIT $2;

-- name: forget
DELETE FROM {diff} AS d USING unnest($1::bigint[]) AS w (n) WHERE d.n = w.n;

-- name: empty_staging
DELETE FROM {staging};

-- name: empty_diff
DELETE FROM {diff};

-- name: vacuum
VACUUM {staging}, {diff};

-- What is applied: slices of the diff, each by one statement. {in_slice} is false for all rows where
-- the table isn't the one that was inspected.

-- name: is_same
SELECT count(*) = {count_types} FROM pg_attribute AS a
WHERE a.attrelid = {oid} AND a.attrelid = to_regclass({target_name})
    AND (a.attname, format_type(a.atttypid, a.atttypmod)) IN ({types});

-- name: insert
INSERT INTO {target} ({columns}{comma_synced_at})
SELECT {keys}, {values}{comma_now} FROM {diff} WHERE {in_slice} AND op = 'i' ORDER BY n;

-- name: update
UPDATE {target} AS t SET {set_values}
FROM (SELECT * FROM {diff} WHERE {in_slice} AND op = 'u' ORDER BY n) AS s
WHERE {same_key};

-- name: delete
DELETE FROM {target} AS t
USING (SELECT * FROM {diff} WHERE {in_slice} AND op = 'd' ORDER BY n) AS s
WHERE {same_key} AND {is_ours};

-- The same with history: each statement writes its changes with what it changes, and tells how many
-- rows it wrote. $4 is the run, $5 the mapping.

-- name: insert_kept
WITH done AS (
    INSERT INTO {target} AS t ({columns}{comma_synced_at})
    SELECT {keys}, {values}{comma_now} FROM {diff} WHERE {in_slice} AND op = 'i' ORDER BY n
    RETURNING {t_key_texts} AS key, {t_json} AS new
), kept AS (
    INSERT INTO {changes} (mapping, key, at, run_id, op, new) SELECT $5, key, $3, $4, 'i', new FROM done
)
SELECT count(*) FROM done;

-- name: update_kept
-- Only rows that are still what the diff saw: then that is what they held.
WITH done AS (
    UPDATE {target} AS t SET {set_values}
    FROM (SELECT * FROM {diff} WHERE {in_slice} AND op = 'u' ORDER BY n) AS s
    WHERE {same_key} AND NOT ({t_differs_from_old})
    RETURNING {s_key_texts} AS key, {old_json} AS old, {t_json} AS new
), kept AS (
    INSERT INTO {changes} (mapping, key, at, run_id, op, old, new)
    SELECT $5, key, $3, $4, 'u', old, new FROM done
)
SELECT count(*) FROM done;

-- name: delete_kept
WITH done AS (
    DELETE FROM {target} AS t
    USING (SELECT * FROM {diff} WHERE {in_slice} AND op = 'd' ORDER BY n) AS s
    WHERE {same_key} AND {is_ours}
    RETURNING {s_key_texts} AS key, {t_json} AS old
), kept AS (
    INSERT INTO {changes} (mapping, key, at, run_id, op, old) SELECT $5, key, $3, $4, 'd', old FROM done
)
SELECT count(*) FROM done;

-- Was it written? Rules and triggers may drop a row in silence, or make another one of it.

-- name: has_unwritten
SELECT EXISTS (
    SELECT FROM (SELECT * FROM {diff} WHERE {in_slice} AND op <> 'd' ORDER BY n) AS s
        LEFT JOIN {target} AS t ON {same_key} WHERE {no_row} OR {differs});

-- name: has_undeleted
SELECT EXISTS (
    SELECT FROM (SELECT * FROM {diff} WHERE {in_slice} AND op = 'd' ORDER BY n) AS s
        JOIN {target} AS t ON {same_key} WHERE {is_ours});
