-- SELECTs over the flights that KalamDB and DuckDB define the same: every order is total, NULLs are placed.

-- Counting and filters

-- name: count
SELECT count(*), count(arr_delay), count(tailnum), count(DISTINCT dest) FROM flights;

-- name: empty
SELECT count(*), sum(distance), min(day), avg(fare::DOUBLE) FROM flights WHERE dest = 'nowhere';

-- name: equal
SELECT * FROM flights WHERE dest = 'HNL' ORDER BY time_hour, carrier, flight;

-- name: not_equal_skips_null
SELECT count(*) FROM flights WHERE tailnum <> 'N14228';

-- name: is_null
SELECT carrier, count(*) FROM flights WHERE dep_time IS NULL GROUP BY carrier ORDER BY carrier;

-- name: is_not_null_and
SELECT count(*) FROM flights WHERE arr_delay IS NOT NULL AND (origin = 'JFK' OR dest = 'ATL') AND NOT carrier =
'DL';

-- name: between
SELECT count(*), sum(distance) FROM flights WHERE distance BETWEEN 500 AND 1000;

-- name: in_list
SELECT origin, count(*) FROM flights WHERE dest IN ('SFO', 'LAX', 'SEA') GROUP BY origin ORDER BY origin;

-- name: not_in_list_with_null
SELECT count(*) FROM flights WHERE tailnum NOT IN ('N14228', 'N24211', NULL);

-- name: in_list_or_null
SELECT count(*) FROM flights WHERE dep_delay IN (0, 1, NULL) OR dep_delay IS NULL;

-- name: three_valued_logic
SELECT count(*) FROM flights WHERE NOT (arr_delay > 0 AND dep_delay > 0) OR (arr_delay > 0) IS NULL;

-- name: is_distinct_from
SELECT count(*) FROM flights WHERE arr_delay IS DISTINCT FROM dep_delay;

-- name: is_not_distinct_from
SELECT count(*) FROM trips WHERE note IS NOT DISTINCT FROM NULL;

-- name: boolean_column
SELECT on_time, count(*) FROM flights GROUP BY on_time ORDER BY on_time NULLS FIRST;

-- name: is_true_is_false
SELECT sum(CASE WHEN on_time IS TRUE THEN 1 ELSE 0 END), sum(CASE WHEN on_time IS FALSE THEN 1 ELSE 0 END),
sum(CASE WHEN on_time IS NULL THEN 1 ELSE 0 END) FROM flights;

-- name: like
SELECT count(*) FROM airports WHERE name LIKE '%Intl%' AND name NOT LIKE 'S%';

-- name: like_underscore
SELECT faa FROM airports WHERE faa LIKE '_0_' ORDER BY faa LIMIT 20;

-- name: ilike
SELECT count(*) FROM airports WHERE name ILIKE '%FIELD';

-- name: arithmetic_filter
SELECT count(*) FROM flights WHERE dep_delay - arr_delay > 10 AND flight % 7 = 3 AND -distance < -800;

-- name: range_of_primary_key
SELECT id, carrier, arr_delay FROM trips WHERE id >= 100 AND id < 130 ORDER BY id;

-- name: constants
SELECT 1 AS one, 'a''b' AS quoted, NULL AS nothing, TRUE AS yes, 2.50 AS price;

-- Order and limit

-- name: order_desc_nulls_last
SELECT flight, arr_delay FROM flights ORDER BY arr_delay DESC NULLS LAST, time_hour, carrier, flight LIMIT 50;

-- name: order_asc_nulls_first
SELECT flight, dep_delay FROM flights ORDER BY dep_delay ASC NULLS FIRST, time_hour, carrier, flight LIMIT 400;

-- name: limit_offset
SELECT time_hour, carrier, flight FROM flights ORDER BY 1, 2, 3 LIMIT 25 OFFSET 1000;

-- name: offset_behind_the_end
SELECT carrier FROM airlines ORDER BY carrier LIMIT 5 OFFSET 100;

-- name: order_by_expression
SELECT id FROM trips ORDER BY abs(coalesce(arr_delay, 0)) DESC, id LIMIT 30;

-- name: order_by_alias
SELECT carrier, distance * 2 AS twice FROM trips ORDER BY twice DESC NULLS LAST, id LIMIT 12;

-- Aggregates

-- name: group_by
SELECT carrier, count(*), min(arr_delay), max(arr_delay), sum(distance), avg(arr_delay) FROM flights GROUP BY
carrier ORDER BY carrier;

-- name: group_by_two
SELECT origin, dest, count(*) AS n, avg(air_time) FROM flights GROUP BY origin, dest ORDER BY n DESC, origin,
dest LIMIT 40;

-- name: group_by_null_group
SELECT tailnum, count(*) AS n FROM flights GROUP BY tailnum ORDER BY n DESC, tailnum NULLS FIRST LIMIT 20;

-- name: group_by_expression
SELECT extract(month FROM day) AS m, carrier, sum(fare) FROM flights GROUP BY 1, carrier ORDER BY 1, carrier;

-- name: having
SELECT dest, count(*) AS n FROM flights GROUP BY dest HAVING count(*) > 300 AND min(distance) > 400 ORDER BY n
DESC, dest;

-- name: having_without_group
SELECT max(distance) FROM flights HAVING count(*) > 10;

-- name: stddev_and_variance
SELECT carrier, stddev_samp(arr_delay), var_pop(dep_delay), corr(dep_delay, arr_delay) FROM flights WHERE
carrier IN ('UA', 'AA', 'DL') GROUP BY carrier ORDER BY carrier;

-- name: median
SELECT origin, median(distance::DOUBLE) FROM flights GROUP BY origin ORDER BY origin;

-- name: aggregate_filter
SELECT count(*) FILTER (WHERE origin = 'JFK'), sum(distance) FILTER (WHERE arr_delay > 60), count(*) FILTER
(WHERE FALSE) FROM flights;

-- name: count_distinct_groups
SELECT carrier, count(DISTINCT tailnum) FROM flights GROUP BY carrier ORDER BY carrier;

-- name: sum_distinct
SELECT sum(DISTINCT distance), avg(DISTINCT air_time) FROM flights;

-- name: boolean_aggregates
SELECT carrier, bool_and(on_time), bool_or(on_time) FROM flights GROUP BY carrier ORDER BY carrier;

-- name: string_agg
SELECT string_agg(carrier, '+' ORDER BY carrier DESC) FROM airlines;

-- name: rollup
SELECT origin, carrier, count(*) FROM flights GROUP BY ROLLUP (origin, carrier) ORDER BY origin NULLS FIRST,
carrier NULLS FIRST;

-- name: grouping_sets
SELECT origin, on_time, sum(distance) FROM flights WHERE on_time IS NOT NULL GROUP BY GROUPING SETS ((origin),
(on_time), ()) ORDER BY origin NULLS FIRST, on_time NULLS FIRST;

-- name: distinct
SELECT DISTINCT origin, carrier FROM flights ORDER BY origin, carrier;

-- name: distinct_expression
SELECT DISTINCT substr(dest, 1, 1) AS letter FROM flights ORDER BY letter;

-- name: distinct_on
SELECT DISTINCT ON (carrier) carrier, flight, distance FROM flights ORDER BY carrier, distance DESC, time_hour,
flight;

-- Joins

-- name: inner_join
SELECT a.name, count(*) AS n FROM flights f JOIN airlines a ON a.carrier = f.carrier GROUP BY a.name ORDER BY n
DESC, a.name;

-- name: left_join
SELECT f.dest, ap.name, count(*) FROM flights f LEFT JOIN airports ap ON ap.faa = f.dest GROUP BY f.dest,
ap.name ORDER BY f.dest, ap.name NULLS LAST;

-- name: left_join_is_null
SELECT DISTINCT f.dest FROM flights f LEFT JOIN airports a ON a.faa = f.dest WHERE a.faa IS NULL ORDER BY f.dest;

-- name: right_join
SELECT a.carrier, count(t.id) FROM trips t RIGHT JOIN airlines a ON a.carrier = t.carrier GROUP BY a.carrier
ORDER BY a.carrier;

-- name: full_join
SELECT coalesce(r.carrier, a.carrier) AS c, count(r.flights), count(a.name) FROM (SELECT * FROM routes WHERE
carrier < 'F') r FULL JOIN (SELECT * FROM airlines WHERE carrier > 'B') a ON r.carrier = a.carrier GROUP BY 1
ORDER BY 1;

-- name: three_tables
SELECT p.manufacturer, al.name, count(*) AS n, sum(p.seats) FROM flights f JOIN planes p ON p.tailnum =
f.tailnum JOIN airlines al USING (carrier) GROUP BY p.manufacturer, al.name ORDER BY n DESC, p.manufacturer,
al.name LIMIT 30;

-- name: composite_join
SELECT f.origin, round(avg(w.temp), 3), count(*) FROM flights f JOIN weather w ON w.origin = f.origin AND
w.time_hour = f.time_hour WHERE f.arr_delay > 30 GROUP BY f.origin ORDER BY f.origin;

-- name: user_table_joins_shared
SELECT a.name, count(*) AS n, sum(t.fare) FROM trips t JOIN airlines a USING (carrier) GROUP BY a.name ORDER BY
a.name;

-- name: inequality_join
SELECT a.carrier, count(*) FROM airlines a JOIN airlines b ON a.carrier < b.carrier GROUP BY a.carrier ORDER BY
a.carrier;

-- name: self_join
SELECT count(*) FROM routes x JOIN routes y ON x.origin = y.origin AND x.dest = y.dest AND x.carrier < y.carrier;

-- name: cross_join
SELECT count(*), sum(length(a.carrier || b.faa)) FROM airlines a CROSS JOIN airports b;

-- name: semi_join_exists
SELECT count(*) FROM planes p WHERE EXISTS (SELECT 1 FROM flights f WHERE f.tailnum = p.tailnum AND f.dest =
'SFO');

-- name: anti_join_not_exists
SELECT count(*) FROM planes p WHERE NOT EXISTS (SELECT 1 FROM flights f WHERE f.tailnum = p.tailnum AND
f.arr_delay > 60);

-- Sub-queries and CTEs

-- name: in_subquery
SELECT count(*) FROM flights WHERE tailnum IN (SELECT tailnum FROM planes WHERE seats > 300);

-- name: not_in_subquery
SELECT count(*) FROM flights WHERE dest NOT IN (SELECT faa FROM airports);

-- name: scalar_subquery
SELECT carrier, count(*) FROM flights WHERE distance > (SELECT avg(distance) FROM flights) GROUP BY carrier
ORDER BY carrier;

-- name: correlated_subquery
SELECT a.carrier, (SELECT max(f.distance) FROM flights f WHERE f.carrier = a.carrier) AS far FROM airlines a
ORDER BY a.carrier;

-- name: derived_table
SELECT avg(n), max(n) FROM (SELECT day, count(*) AS n FROM flights GROUP BY day) AS per_day;

-- name: cte
WITH late AS (SELECT carrier, count(*) AS n FROM flights WHERE arr_delay > 30 GROUP BY carrier), total AS
(SELECT carrier, count(*) AS n FROM flights GROUP BY carrier) SELECT total.carrier, late.n, total.n, CAST(late.n
AS DOUBLE) / total.n FROM total LEFT JOIN late USING (carrier) ORDER BY total.carrier;

-- name: cte_used_twice
WITH d AS (SELECT day, sum(distance) AS far FROM flights GROUP BY day) SELECT d.day, d.far FROM d WHERE d.far >
(SELECT avg(far) * 1.1 FROM d) ORDER BY d.day;

-- name: recursive_cte
WITH RECURSIVE n AS (SELECT 1 AS v UNION ALL SELECT v + 1 FROM n WHERE v < 12) SELECT n.v, count(f.flight) FROM
n LEFT JOIN flights f ON extract(month FROM f.day) = n.v GROUP BY n.v ORDER BY n.v;

-- name: nested_subqueries
SELECT count(*) FROM trips WHERE carrier IN (SELECT carrier FROM routes WHERE dest IN (SELECT faa FROM airports
WHERE alt > 3000)) AND distance > (SELECT min(distance) FROM trips WHERE origin = 'EWR');

-- name: lateral_values
SELECT v.k, v.label FROM (VALUES (1, 'one'), (2, 'two'), (3, NULL)) AS v(k, label) ORDER BY v.k;

-- Windows

-- name: row_number
SELECT carrier, dest, n FROM (SELECT carrier, dest, flights, row_number() OVER (PARTITION BY carrier ORDER BY
flights DESC, origin, dest) AS n FROM routes) AS ranked WHERE n <= 2 ORDER BY carrier, n;

-- name: rank
SELECT carrier, rank() OVER (ORDER BY n DESC), dense_rank() OVER (ORDER BY n DESC) FROM (SELECT carrier,
count(*) AS n FROM routes GROUP BY carrier) AS c ORDER BY carrier;

-- name: lag_and_lead
SELECT day, n, lag(n) OVER (ORDER BY day), lead(n, 2, -1) OVER (ORDER BY day) FROM (SELECT day, count(*) AS n
FROM flights GROUP BY day) AS d ORDER BY day LIMIT 60;

-- name: running_sum
SELECT id, sum(distance) OVER (PARTITION BY carrier ORDER BY id) FROM trips ORDER BY id LIMIT 100;

-- name: moving_average
SELECT day, avg(n) OVER (ORDER BY day ROWS BETWEEN 6 PRECEDING AND CURRENT ROW) FROM (SELECT day, count(*) AS n
FROM flights GROUP BY day) AS d ORDER BY day;

-- name: first_and_last_value
SELECT DISTINCT origin, first_value(dest) OVER w, last_value(dest) OVER w FROM routes WINDOW w AS (PARTITION BY
origin ORDER BY flights, carrier, dest ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) ORDER BY origin;

-- name: ntile
SELECT carrier, ntile(4) OVER (ORDER BY carrier) FROM airlines ORDER BY carrier;

-- name: share_of_total
SELECT carrier, CAST(n AS DOUBLE) / sum(n) OVER () FROM (SELECT carrier, count(*) AS n FROM flights GROUP BY
carrier) AS c ORDER BY carrier;

-- Set operations

-- name: union
SELECT origin FROM flights UNION SELECT faa FROM airports WHERE faa LIKE 'J%' ORDER BY 1;

-- name: union_all
SELECT 'flights' AS t, count(*) FROM flights UNION ALL SELECT 'trips', count(*) FROM trips UNION ALL SELECT
'weather', count(*) FROM weather ORDER BY 1;

-- name: intersect
SELECT dest FROM flights INTERSECT SELECT faa FROM airports WHERE alt > 1000 ORDER BY 1;

-- name: except
SELECT faa FROM airports WHERE faa LIKE 'B%' EXCEPT SELECT dest FROM flights ORDER BY 1;

-- name: union_with_null
SELECT note FROM trips WHERE id < 300 UNION SELECT NULL ORDER BY 1 NULLS LAST;

-- NULL handling and CASE

-- name: coalesce_nullif
SELECT coalesce(note, 'none'), nullif(carrier, 'UA'), coalesce(arr_delay, distance, -1) FROM trips ORDER BY id
LIMIT 60;

-- name: case_searched
SELECT CASE WHEN arr_delay IS NULL THEN 'lost' WHEN arr_delay <= 0 THEN 'on time' WHEN arr_delay < 60 THEN
'late' ELSE 'very late' END AS how, count(*), sum(fare) FROM flights GROUP BY 1 ORDER BY 1;

-- name: case_simple
SELECT CASE origin WHEN 'JFK' THEN 1 WHEN 'LGA' THEN 2 END AS o, count(*) FROM flights GROUP BY 1 ORDER BY 1
NULLS LAST;

-- name: null_arithmetic
SELECT id, arr_delay + distance, fare * 2, 'x' || note FROM trips WHERE id % 100 = 7 ORDER BY id;

-- name: aggregates_skip_null
SELECT avg(wind_gust), count(wind_gust), count(*) - count(wind_gust) FROM weather;

-- Decimals and floats

-- name: decimal_sum
SELECT carrier, sum(fare), min(fare), max(fare), count(fare) FROM flights GROUP BY carrier ORDER BY carrier;

-- name: decimal_compare
SELECT count(*) FROM flights WHERE fare > 123.45 AND fare <= 500;

-- name: decimal_equals_literal
SELECT id, fare FROM trips WHERE fare = 238.28 OR fare IN (180.72, 0.01) OR 28.19 = fare ORDER BY id;

-- name: large_decimal_equals_literal
SELECT count(*), sum(fare) FROM trips WHERE fare + 999000 > 0 HAVING sum(fare) > 100.5 AND NOT sum(fare) = 73787.01;

-- name: decimal_arithmetic
SELECT id, fare + 1.10, fare - 0.05, fare * 3, -fare FROM trips WHERE fare IS NOT NULL ORDER BY id LIMIT 40;

-- name: decimal_group_key
SELECT fare, count(*) AS n FROM flights GROUP BY fare ORDER BY n DESC, fare NULLS FIRST LIMIT 25;

-- name: decimal_cast
SELECT CAST(fare AS DOUBLE), CAST(distance AS DECIMAL(12,3)) FROM trips ORDER BY id LIMIT 20;

-- name: float_math
SELECT origin, round(sum(precip), 6), sqrt(max(temp)), avg(wind_speed), floor(min(pressure)), ceil(max(visib))
FROM weather GROUP BY origin ORDER BY origin;

-- name: float_column_filter
SELECT count(*) FROM weather WHERE wind_speed > 20.5 AND wind_gust IS NOT NULL;

-- name: integer_functions
SELECT abs(min(arr_delay)), greatest(1, 7, 3), least(4, 2), 17 % 5, -17 % 5 FROM trips;

-- Dates and timestamps

-- name: date_filter
SELECT count(*) FROM flights WHERE day >= DATE '2013-03-01' AND day < DATE '2013-04-01';

-- name: timestamp_filter
SELECT count(*) FROM flights WHERE time_hour >= TIMESTAMP '2013-07-04 12:00:00' AND time_hour < TIMESTAMP
'2013-07-05';

-- name: extract
SELECT extract(year FROM time_hour), extract(month FROM time_hour), extract(hour FROM time_hour), count(*) FROM
flights GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;

-- name: date_trunc
SELECT date_trunc('month', time_hour) AS m, count(*) FROM flights GROUP BY 1 ORDER BY 1;

-- name: min_max_of_times
SELECT min(day), max(day), min(time_hour), max(time_hour) FROM flights;

-- name: interval_arithmetic
SELECT carrier, flight, time_hour + INTERVAL '90 minutes', time_hour - INTERVAL '1 day' FROM flights ORDER BY
time_hour, carrier, flight LIMIT 20;

-- name: date_of_timestamp
SELECT CAST(time_hour AS DATE) AS d, count(*) FROM flights GROUP BY 1 ORDER BY 1 LIMIT 40;

-- name: null_date
SELECT id, day FROM trips WHERE day IS NULL OR day > DATE '2013-12-30' ORDER BY day NULLS FIRST, id LIMIT 30;

-- Strings and casts

-- name: string_functions
SELECT upper(name), lower(faa), length(name), substr(name, 2, 4), replace(name, ' ', '_'), trim('  x ')
FROM airports ORDER BY faa LIMIT 40;

-- name: concat_and_strpos
SELECT faa || '-' || coalesce(tzone, '?'), strpos(name, 'a'), left(name, 3), right(name, 3) FROM airports ORDER
BY faa LIMIT 40;

-- name: pad_and_reverse
SELECT lpad(carrier, 4, '*'), rpad(carrier, 4, '-'), reverse(name), repeat(carrier, 2) FROM airlines ORDER BY
carrier;

-- name: split_part
SELECT split_part(tzone, '/', 1) AS region, count(*) FROM airports GROUP BY 1 ORDER BY 1 NULLS FIRST;

-- name: order_is_binary
SELECT name FROM airports WHERE dst = 'N' OR faa > 'Y' ORDER BY name, faa LIMIT 50;

-- name: casts
SELECT CAST('42' AS INT), CAST(3 AS TEXT), CAST(1 AS BOOLEAN), CAST('2013-01-31' AS DATE), CAST(NULL AS INT);

-- name: cast_column
SELECT CAST(flight AS TEXT) || carrier AS code, count(*) AS n FROM flights GROUP BY 1 ORDER BY n DESC, code
LIMIT 10;

-- name: text_with_quote
SELECT count(*) FROM trips WHERE note = 'very late, ''sorry''';
