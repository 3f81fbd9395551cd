// What a dashboard's JSON may hold: Grafana's own types, and of the panels that ours have, their options too.
import type { Dashboard, FieldConfig, Panel, RowPanel } from '@grafana/schema';
import type { Options as StatOptions } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type {
  FieldConfig as LinesConfig,
  Options as LinesOptions,
} from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON has the values of an enum, not its members.
type Plain<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Plain<Item>[]
    : T extends object
      ? { [Key in keyof T]: Plain<T[Key]> }
      : T;

interface DataSource {
  type: 'prometheus';
  uid: '${datasource}';
}

interface Query {
  refId: string;
  datasource: DataSource;
  expr: string;
  legendFormat: string;
  instant: boolean;
  range: boolean;
}

interface Place {
  gridPos: { h: number; w: number; x: number; y: number };
}

type Shown<Kind, Options, Custom> = Place & {
  type: Kind;
  id: number;
  title: string;
  description: string;
  datasource: DataSource;
  options: Plain<Options>;
  targets: Query[];
  fieldConfig: { defaults: Plain<Omit<FieldConfig, 'custom'>> & Custom; overrides: [] };
};

type OurPanel =
  | Shown<'stat', StatOptions, {}>
  | Shown<'timeseries', LinesOptions, { custom: Plain<LinesConfig> }>
  | Plain<RowPanel>;

export type OurDashboard = Omit<Plain<Partial<Dashboard>>, 'panels'> & { panels: OurPanel[] };
